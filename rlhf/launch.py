"""From a command line to a checked config: compose, refuse, sweep, start ranks, exit codes.

Exit codes: 0 finished or up to date, 1 a crash, 2 refused (one message, no traceback),
3 stopped by a run-time guard, 130/143 interrupted.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from rlhf import config, guards, interrupts, lifeline, ranks
from rlhf.errors import ConfigError, RLHFError, StoppedByGuard
from rlhf.manifest import flat

C = TypeVar("C", bound=config.StageConfig)

GRACE = 10.0  # seconds a rank has to end in order before it is killed
PATIENCE = 5.0  # seconds that another rank leaves rank 0 to say the same, before it speaks itself


def stage(name: str) -> Callable[[Callable[[C], None]], Callable[[], None]]:
    """Decorate `main(cfg)` of `stages/<name>.py`: it is called with a checked, plain dataclass."""

    def decorate(main: Callable[[C], None]) -> Callable[[], None]:
        def run() -> None:
            code = 1
            try:
                try:
                    code = _run(name, main)
                finally:
                    if ranks.world_size() > 1:
                        interrupts.leave_undisturbed()
            except (KeyboardInterrupt, interrupts.Terminated):  # told so twice: it was leaving
                interrupts.leave_undisturbed()
                code = 143 if code == 1 else code
            finally:
                lifeline.leave(failed=code != 0)
            sys.exit(code)

        return run

    return decorate


def _run(name: str, main: Callable[[C], None]) -> int:
    interrupts.terminate_in_order()
    # Before torch is loaded: its threads sleep while they wait. Spinning, they cost a factor of
    # 10 to 100 on small models as soon as another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Old launchers say in an argument what LOCAL_RANK says; Hydra would take it for an override.
    sys.argv[1:] = [a for a in sys.argv[1:] if not re.fullmatch(r"--local[_-]rank=\d+", a)]
    try:
        processes = _processes(os.environ.get("NPROC") or "1")
        ranks.adopt_launcher(processes)
        if any(flag in sys.argv[1:] for flag in ("-m", "--multirun")):
            if ranks.world_size() > 1:
                raise ConfigError(
                    f"-m with WORLD_SIZE={ranks.world_size()}: every rank would sweep by itself. "
                    "Start the sweep with plain python; NPROC=... gives each of its runs several "
                    "processes."
                )
            return sweep([a for a in sys.argv[1:] if a not in ("-m", "--multirun")])
        cfg: Any = compose(name)
        if cfg is None:  # Hydra was asked to show something: --help, --cfg job
            return 0
        notes = guards.check(cfg, guards.facts(max(processes, ranks.world_size())))
        if processes > 1:
            return start_ranks(processes)
        for note in notes:
            say(note)
        main(cfg)
        return 0
    except RLHFError as error:
        return refuse(str(error))
    except StoppedByGuard as error:
        say(f"\nstopped: {error}")
        return 3
    except KeyboardInterrupt:
        if ranks.is_main():
            say(f"\ninterrupted: {ranks.NOT_LOST}")
        return 130
    except interrupts.Terminated:
        if ranks.is_main():
            say(f"\nterminated: {ranks.NOT_LOST}")
        return 143
    except Exception as error:
        if ranks.lost_another(error):
            return lost(str(error))
        if not may_speak():  # rank 0 has shown what happened, here as there
            return 1
        raise


def _processes(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"NPROC={text}: it is the number of processes to start, 1 or more.")
    return int(text)


def refuse(message: str) -> int:
    """Print why nothing was done; the exit code of that."""
    say(f"refused: {message}")
    return 2


def lost(reason: str) -> int:
    """Say that another process is gone, for which this one waited; the exit code of that."""
    if ranks.PARENT in os.environ:  # it sees which one, says so, and ends this one
        speaks = not interrupts.told_to_end() and left_alone(4 * PATIENCE)
    else:
        speaks = ranks.is_main() or (not interrupts.told_to_end() and left_alone())
    if speaks:
        first = re.sub(r"^\[\S+\] ", "", reason.strip()).split(". ")[0]
        _print(
            f"\nlost: another process has ended or is out of reach ({first[:200]}). What it said "
            f"stands above, or in the log of its machine; {ranks.NOT_LOST}"
        )
    return 1


def say(message: str) -> None:
    """Print one message to stderr; rank 0 speaks for all, unless it has nothing to say."""
    if may_speak():
        _print(message)


def _print(message: str) -> None:
    if not ranks.is_main():
        message = f"[{ranks.name()}] {message.lstrip()}"
    print(message, file=sys.stderr, flush=True)


def may_speak() -> bool:
    """True on rank 0; on another rank where rank 0 did not come to the same end.

    What all ranks find out rank 0 says, and the launcher ends the others while they wait. What one
    of them alone finds out is not lost.
    """
    return ranks.is_main() or left_alone()


def left_alone(seconds: float = PATIENCE) -> bool:
    """Wait a little; False where this process is told to end, or rank 0 fails, in that time."""
    try:
        return not lifeline.main_failed.wait(seconds)
    except (KeyboardInterrupt, interrupts.Terminated):
        return False


# ---------------------------------------------------------------- composing


def compose(name: str) -> config.StageConfig | None:
    """The config of stage `name` from `conf/` and this process's command line, checked.

    Returns:
        A plain dataclass, or None where Hydra was asked only to show something.

    Raises:
        ConfigError: an unknown setting, a wrong type, a value missing or one that cannot work.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach us instead of Hydra's printer
    config.register()
    composed: list[DictConfig] = []
    try:
        hydra.main(version_base="1.3", config_path=str(config.CONF), config_name=name)(
            composed.append
        )()
        return to_dataclasses(composed[0], name) if composed else None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error, name)) from error


def to_dataclasses(composed: DictConfig, name: str) -> config.StageConfig:
    """Refuse missing and unknown values, resolve the rest, run every `__post_init__`."""
    if missing := sorted(OmegaConf.missing_keys(composed)):
        hint = " ".join(f"{key}=..." for key in missing)
        raise ConfigError(f"{', '.join(missing)}: not set, and there is no default. Add {hint}")
    for key in _added_keys(composed):
        raise ConfigError(_unknown(key, name))
    if composed.stage != name:
        raise ConfigError(
            f"stage={composed.stage}: this is the {name} stage. Run stages/{composed.stage}.py "
            "for that one; a run is named by run=... and run_name=..."
        )
    OmegaConf.resolve(composed)
    return OmegaConf.to_object(composed)  # type: ignore[return-value]


def _added_keys(node: DictConfig, prefix: str = "") -> list[str]:
    """Keys that `+key=value` put beside those of a node's dataclass."""
    schema = OmegaConf.get_type(node)
    known = {f.name for f in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else {}
    names = [str(key) for key in node]
    added = [f"{prefix}{key}" for key in names if known and key not in known]
    for key in names:
        if OmegaConf.is_dict(node._get_node(key)):
            added += _added_keys(node[key], f"{prefix}{key}.")
    return added


def explain(error: Exception, name: str) -> str:
    """One line on what Hydra or OmegaConf refused: the setting, why, and the near misses."""
    chain = list(_causes(error))
    for item in chain:  # the one that names the setting
        if found := re.search(r"full_key: (\S+)", str(item)):
            key = found.group(1)
            if isinstance(item, ConfigKeyError | ConfigAttributeError):
                return _unknown(key, name)
            return f"{key}: {str(item).splitlines()[0].rstrip('.')}."
    text = str(error)
    if found := re.search(r"Could not find '([\w.-]+)/([^']+)'", text):
        group, chosen = found.groups()
        choices = sorted(path.stem for path in (config.CONF / group).glob("*.yaml"))
        way = f" Write reward=function reward.function={chosen}" if chosen.find(".py:") > 0 else ""
        return f"{group}={chosen}: no such choice. Choose one of: {', '.join(choices)}.{way}"
    if text.startswith("Ambiguous value"):  # Hydra goes on to say how to write each meaning
        return text
    given = " ".join(sys.argv[1:])
    return f"{text.splitlines()[0].rstrip('.')}. Overrides look like key=value; given: {given}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unknown(key: str, name: str) -> str:
    known = known_keys(name)
    near = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    near += difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    ways = f" Did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
    if key in known:
        ways = f" It belongs to another choice of {key.split('.')[0]}."
    return f"{key}: the {name} stage has no such setting as composed here.{ways}"


def known_keys(name: str) -> list[str]:
    """Every dotted setting of a stage, and its groups (method settings: those of LoRA)."""
    keys = ["experiment"]
    top = OmegaConf.to_container(OmegaConf.structured(config.SCHEMAS[name]), resolve=False)
    assert isinstance(top, dict)
    for key, value in top.items():
        if key in config.GROUPS:
            keys.append(str(key))
            node = OmegaConf.structured(config.GROUPS[str(key)])
            value = OmegaConf.to_container(node, resolve=False)
        keys += list(flat({str(key): value}))
    return keys


# ---------------------------------------------------------------- sweeps


def sweep(arguments: list[str]) -> int:
    """Run one process per combination; run names get a readable suffix from the swept values."""
    try:
        overrides = OverridesParser.create().parse_overrides(arguments)
        swept = [o for o in overrides if o.is_sweep_override()]
        choices = [[(o.key_or_group, str(v)) for v in o.sweep_string_iterator()] for o in swept]
    except HydraException as error:
        given = " ".join(arguments)
        raise ConfigError(f"-m: {str(error).splitlines()[0]}. Given: {given}") from error
    if not swept:
        raise ConfigError("-m: nothing to sweep. Give a setting several values: ppo.kl_coef=0,0.1")
    if any(o.key_or_group == "run_name" for o in swept):
        raise ConfigError(
            "-m run_name: cannot be swept; every run is named by the settings that are. Give "
            "one run_name, which heads those names, or none."
        )
    named = [o for o in overrides if o.key_or_group == "run_name"]
    stem = (named[-1].value() if named else None) or "${run}"
    fixed = [o.input_line or "" for o in overrides if o not in swept and o not in named]
    runs = {_suffix(combination): combination for combination in itertools.product(*choices)}
    if len(runs) < math.prod(map(len, choices)):
        raise ConfigError(
            f"-m: two of the runs would have one name ({', '.join(runs)}). Sweep values that "
            "differ in letters, digits or . _ = + , -"
        )
    worst = 0
    for suffix, combination in runs.items():
        values = [f"{key}={value}" for key, value in combination]
        run_name = f"run_name='{stem}-{suffix}'"
        command = [sys.executable, sys.argv[0], *fixed, *values, run_name]
        print(f"[sweep] {' '.join(command[2:])}", file=sys.stderr)
        code = subprocess.call(command)
        worst = worst or code
        if code in (130, 143):
            break
    return worst


def _suffix(combination: tuple[tuple[str, str], ...]) -> str:
    """What tells one run of a sweep from the others, as part of a folder's name."""
    text = ",".join(f"{key.split('.')[-1]}={value}" for key, value in combination)
    return re.sub(r"[^A-Za-z0-9._=+,-]", "_", text)


# ---------------------------------------------------------------- several processes


def start_ranks(processes: int) -> int:
    """Start `processes` ranks of this very command on this machine; their first failure ends all.

    The command was composed and guarded before, so a refusal never starts a rank. A rank that was
    killed is named.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        env = os.environ | {
            ranks.PARENT: str(os.getpid()),
            "NPROC": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        # In a session of its own: Ctrl-C reaches this process alone, which passes it on once.
        command = [sys.executable, *sys.argv]
        started.append(subprocess.Popen(command, env=env, start_new_session=True))
    try:
        with interrupts.held() as held:
            passed_on = False
            while True:
                codes = [process.poll() for process in started]
                failed = [code for code in codes if code]
                stopping = held.asked is not None and None in codes  # they leave one by one
                if failed and not stopping:
                    # A rank that ends with 1 may only have lost another one.
                    code = next((code for code in failed if code != 1), 1)
                    if code < 0:
                        say(f"\n{_killed(codes.index(code), processes, -code)} {ranks.NOT_LOST}")
                    return code if code > 0 else 128 - code
                if all(code == 0 for code in codes):
                    return 0
                if held.asked is not None and not passed_on:
                    passed_on = True
                    for process in started:
                        process.send_signal(held.asked)
                time.sleep(0.1)
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + GRACE
        for process in started:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:  # in a collective call, where no signal is heard
                process.kill()
                process.wait()


def _killed(rank: int, processes: int, number: int) -> str:
    why = " (the kernel does that when memory runs out)" if number == signal.SIGKILL else ""
    name = signal.Signals(number).name
    return f"lost: rank {rank} of {processes} was ended by {name}{why}:"
