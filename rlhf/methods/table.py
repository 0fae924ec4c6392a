"""What each fine-tuning method allows. Guards and models are driven by this table; no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: as in `method=<name>`.
        title: one line for people.
        adapter: trains added weights beside a frozen base, rather than the base itself.
        mergeable: the added weights can be folded into the base exactly (up to rounding).
        zero3: right under ZeRO-3 without gathering parameters by hand.
    """

    name: str
    title: str
    adapter: bool
    mergeable: bool
    zero3: bool


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("full", "every weight", adapter=False, mergeable=False, zero3=True),
        Method("lora", "low-rank adapters", adapter=True, mergeable=True, zero3=False),
    )
}
