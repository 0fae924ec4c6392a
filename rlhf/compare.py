"""How two runs differ: settings, parents, data, environment, and metrics side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from rlhf.errors import RegistryError
from rlhf.manifest import (
    DataFacts,
    Manifest,
    Parent,
    flat,
)
from rlhf.registry import (
    Registry,
    parse_reference,
)
from rlhf.run import result_keys

NOT_SET = "(not set)"
PARTS = ("config", "parents", "data", "environment")  # what `facts` tells of a run


@dataclass(frozen=True)
class Difference:
    """One thing that two runs have differently.

    Attributes:
        matters: False where it cannot change results.
    """

    name: str
    left: Any
    right: Any
    matters: bool = True


@dataclass(frozen=True)
class MetricPair:
    """A metric of two runs; None where one did not measure it or it was not finite."""

    name: str
    left: float | None
    right: float | None

    @property
    def change(self) -> float | None:
        """Right minus left."""
        return None if self.left is None or self.right is None else self.right - self.left


@dataclass(frozen=True)
class Comparison:
    """Two finished runs side by side: what differs, and every metric."""

    left: str
    right: str
    config: list[Difference]
    parents: list[Difference]
    data: list[Difference]
    environment: list[Difference]
    metrics: list[MetricPair]

    @property
    def same(self) -> bool:
        """Nothing differs but settings that cannot change results."""
        found = self.config + self.parents + self.data + self.environment
        return not any(d.matters for d in found) and all(m.left == m.right for m in self.metrics)


def compare(registry: Registry, left: str, right: str) -> Comparison:
    """How two finished runs differ, by their manifests.

    Raises:
        RegistryError: one is missing, unfinished or damaged, or a checkpoint is named.
    """
    one, other = (_whole_run(registry, reference) for reference in (left, right))
    parts = (facts(one), facts(other))
    found = {
        part: [
            replace(d, matters=matters(part, d.name, one.config, other.config))
            for d in _differences(parts[0][part], parts[1][part])
        ]
        for part in PARTS
    }
    return Comparison(
        left=one.reference,
        right=other.reference,
        config=sorted(found["config"], key=lambda d: not d.matters),
        parents=found["parents"],
        data=found["data"],
        environment=found["environment"],
        metrics=[
            MetricPair(name, one.metrics.get(name), other.metrics.get(name))
            for name in one.metrics | other.metrics
        ],
    )


def facts(made: Manifest) -> dict[str, dict[str, Any]]:
    """What of a run is compared, by part: a flat table each."""
    return {
        "config": made.config,
        "parents": {p.role: _parent_text(p) for p in made.parents},
        "data": flat({p.split: _data_facts(p) for p in made.data}),
        "environment": _environment(made),
    }


def matters(part: str, name: str, *configs: dict[str, Any]) -> bool:
    """Whether a difference in `name` can change results, given the settings of the runs."""
    if part == "config":
        return any(name in result_keys(config) for config in configs)
    return not (part == "data" and name.endswith(".source"))


def _whole_run(registry: Registry, reference: str) -> Manifest:
    wanted = parse_reference(reference)
    if wanted.checkpoint:
        run = f"{wanted.stage}/{wanted.run_name}"
        raise RegistryError(f"{wanted}: finished runs are compared, not checkpoints. Name {run}.")
    return registry.load(wanted)[0]


def _differences(left: dict[str, Any], right: dict[str, Any]) -> list[Difference]:
    """What two flat tables have differently; 1 and 1.0, or 1 and True, are not the same."""
    pairs = [(name, left.get(name, NOT_SET), right.get(name, NOT_SET)) for name in left | right]
    return [Difference(n, one, other) for n, one, other in pairs if repr(one) != repr(other)]


def _data_facts(part: DataFacts) -> dict[str, Any]:
    facts = asdict(part)
    del facts["split"]
    return facts


def _parent_text(parent: Parent) -> str:
    return f"{parent.reference} (manifest {parent.digest[:12]})"


def _environment(made: Manifest) -> dict[str, Any]:
    """Where a run was made, with what, and from which base: as flat names."""
    facts = asdict(made.environment)
    facts |= {"base": asdict(made.base), "tokenizer": asdict(made.tokenizer)}
    return flat({"rlhf": made.package_version, "git_commit": made.git_commit} | facts)
