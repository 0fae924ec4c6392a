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
        zero_stages: the ZeRO stages under which its training was measured to be right; the others
            are refused (`method-zero-stage` in guards.py).
        zero_reason: what goes wrong under the others; empty where there are none.
    """

    name: str
    title: str
    adapter: bool
    mergeable: bool
    zero_stages: tuple[int, ...]
    zero_reason: str = ""


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("full", "every weight", adapter=False, mergeable=False, zero_stages=(0, 1, 2, 3)),
        Method("lora", "low-rank adapters", adapter=True, mergeable=True, zero_stages=(0, 1, 2, 3)),
    )
}
