"""The console: plain lines in a log file, a live bar on a terminal, the summary on stdout."""

import io
import re
import sys
import threading

import pytest
import rich.console

from rlhf.board import Board, trend
from rlhf.console import HEADLINES, Console, duration


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Screen:
    """A console, with what it wrote and the hands of its clock."""

    def __init__(self, stream=io.StringIO, **how):
        self.err, self.out, self.clock = stream(), stream(), Clock()
        self.console = Console(err=self.err, out=self.out, clock=self.clock, **how)

    @property
    def lines(self):
        return self.err.getvalue().splitlines()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


# -- progress off a terminal


def test_progress_lines_come_every_ten_seconds_with_rate_and_eta():
    screen = Screen()
    with screen.console.progress("ppo", 40) as bar:
        for _ in range(40):
            screen.clock.now += 0.75
            bar.advance()
    # 14 steps pass the first ten seconds (10.5 s), 28 the next (21 s); 4/3 steps a second
    assert screen.lines == [
        "ppo: 14/40 steps, 1.3 steps/s, ETA 20s",  # 26 * 0.75 = 19.5
        "ppo: 28/40 steps, 1.3 steps/s, ETA 9s",  # 12 * 0.75 = 9
        "ppo: 40/40 steps, 1.3 steps/s, 30s in all",
    ]
    assert screen.out.getvalue() == ""


def test_slow_work_is_told_in_seconds_per_unit():
    screen = Screen()
    with screen.console.progress("sft", 100, "batches") as bar:
        screen.clock.now += 25
        bar.advance(2)
    assert screen.lines[0] == "sft: 2/100 batches, 12.5 s/batch, ETA 20m 25s"


def test_a_resumed_run_counts_only_its_own_steps_in_the_rate():
    screen = Screen()
    with screen.console.progress("ppo", 100, done=90) as bar:
        screen.clock.now += 20
        bar.advance(2)
    assert screen.lines[0] == "ppo: 92/100 steps, 10.0 s/step, ETA 1m 20s"


def test_a_short_nested_part_says_nothing_and_a_long_one_speaks():
    screen = Screen()
    console, clock = screen.console, screen.clock
    with console.progress("ppo", 2) as outer:
        with console.progress("evaluate", 4, "prompts") as inner:
            for _ in range(4):
                clock.now += 1
                inner.advance()
        outer.advance()
        with console.progress("evaluate", 4, "prompts") as inner:
            for _ in range(4):
                clock.now += 6
                inner.advance()
        outer.advance()
    assert screen.lines == [
        "evaluate: 2/4 prompts, 6.0 s/prompt, ETA 12s",
        "evaluate: 4/4 prompts, 6.0 s/prompt, 24s in all",
        "ppo: 2/2 steps, 14.0 s/step, 28s in all",
    ]


def test_interrupted_work_says_how_far_it_came():
    screen = Screen()

    def interrupted():
        with screen.console.progress("ppo", 10) as bar:
            screen.clock.now += 2
            bar.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert screen.lines == ["ppo: 1/10 steps, 2.0 s/step, 2s in all"]


@pytest.mark.parametrize("force", [None, "1"])
def test_a_log_file_gets_no_control_characters(monkeypatch, force):
    if force:  # set in many CI services; it asks for colour, not for a bar that redraws
        monkeypatch.setenv("FORCE_COLOR", force)
    screen = Screen()
    with screen.console.progress("sft", 3) as bar:
        for _ in range(3):
            screen.clock.now += 11
            bar.advance()
            screen.console.note("[sft] a note")
    assert len(screen.lines) == 6
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", screen.err.getvalue())


def test_work_of_no_time_and_no_size_is_fine():
    screen = Screen()
    with screen.console.progress("empty", 0):
        pass
    with screen.console.progress("instant", 5) as bar:
        bar.advance(5)
    assert screen.lines == ["empty: 0/0 steps, 0s in all", "instant: 5/5 steps, 0s in all"]


# -- progress on a terminal


def test_a_terminal_gets_a_live_bar_with_nested_parts_and_notes_above():
    screen = Screen(Terminal)
    console, clock = screen.console, screen.clock
    with console.progress("ppo", 4) as outer:
        for _ in range(2):
            clock.now += 0.5
            outer.advance()
            with console.progress("evaluate", 2, "prompts") as inner:
                inner.advance()
                console._live.refresh()
                assert len(console._bars.tasks) == 2
            assert len(console._bars.tasks) == 1
        console.note("[ppo] halfway")
        console._live.refresh()
    assert console._live is None
    text = screen.err.getvalue()
    assert "\x1b[" in text
    assert "evaluate" in text
    assert "[ppo] halfway" in text
    assert "2/4 steps, 2.0 steps/s, ETA 1s" in text
    with console.progress("again", 1) as bar:  # a second display after the first
        bar.advance()
    assert "1/1 steps" in screen.err.getvalue()


def test_what_is_printed_beside_a_live_bar_stays_on_stdout(monkeypatch):
    piped = io.StringIO()
    monkeypatch.setattr("sys.stdout", piped)
    screen = Screen(Terminal)
    with screen.console.progress("ppo", 1):
        print("a result")
    assert piped.getvalue() == "a result\n"
    assert "a result" not in screen.err.getvalue()


def test_an_exception_takes_the_live_display_down():
    screen = Screen(Terminal)

    def interrupted():
        with (
            screen.console.progress("ppo", 4),
            screen.console.progress("evaluate", 4),
        ):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert screen.console._live is None
    assert screen.err.getvalue().count("\x1b[?25l") == screen.err.getvalue().count("\x1b[?25h") == 1


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen(Terminal)
    with screen.console.progress("ppo", 1) as bar:
        screen.clock.now += 1
        bar.advance()
    assert screen.err.getvalue() == "ppo: 1/1 steps, 1.0 steps/s, 1s in all\n"


def test_no_color_is_respected(monkeypatch):
    def colours() -> bool:
        screen = Screen(Terminal)
        with screen.console.progress("ppo", 2) as bar:
            bar.advance()
        codes = re.findall(r"\x1b\[([\d;]*)m", screen.err.getvalue())
        return any(re.search(r"(^|;)[34]\d", code) for code in codes)

    assert colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours()


# -- the live picture


class Glass:
    """What is seen on a terminal: lines of at most `width` characters, as the cursor left them."""

    def __init__(self, text: str, width: int):
        self.lines, self.row, self.column, self.cursor = [""], 0, 0, True
        for code, letter, character in re.findall(r"\x1b\[([?\d;]*)([A-Za-z])|([\s\S])", text):
            if character:
                self._put(character, width)
            elif letter == "A":
                self.row = max(0, self.row - int(code or 1))
            elif (code, letter) == ("2", "K"):
                self.lines[self.row] = ""
            elif code == "?25":
                self.cursor = letter == "h"
            else:
                assert letter == "m", (code, letter)

    def _put(self, character: str, width: int):
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row, self.column = self.row + 1, 0
        else:
            if self.column == width:
                self.row, self.column = self.row + 1, 0
            self.lines += [""] * (self.row + 1 - len(self.lines))
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1
        self.lines += [""] * (self.row + 1 - len(self.lines))

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines)


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")


def stage(screen, steps, *, notes=()):
    """PPO at work; KL rises, so its best is the first, and the score is best in the middle."""
    with screen.console.progress("ppo", 9) as bar:
        for step in steps:
            screen.clock.now += 2
            bar.advance()
            numbers = {"objective/kl": 0.5 * step, "objective/scores": 3.0 - abs(step - 2)}
            screen.console.metrics("ppo", step, 9, numbers | {"loss/policy": 7.0})
            for note in notes:
                screen.console.note(f"{note} {step}")
            screen.console._live.refresh()


def test_a_terminal_has_one_table_of_first_best_and_last(wide):
    screen = Screen(Terminal)
    stage(screen, [1, 2, 3], notes=["[ppo] a note at"])
    glass = Glass(screen.err.getvalue(), 100)
    table = [line.split() for line in glass.text.splitlines() if "/" in line]
    assert table[:3] == [
        ["ppo:", "step", "3/9"],
        ["objective/scores", "2", "3", "@2", "2", "score", "▁█▁"],
        ["objective/kl", "0.5", "0.5", "@1", "1.5", "nats", "▁▅█"],
    ]
    assert len(table) == 4
    assert "3/9 steps, 2.0 s/step, ETA 12s" in glass.text
    notes = [line for line in glass.text.splitlines() if "note" in line]
    assert notes == [f"[ppo] a note at {step}" for step in (1, 2, 3)]
    assert glass.text.index("a note at 3") < glass.text.index("objective/kl")  # above the picture
    assert glass.cursor
    assert "loss/policy" not in glass.text


def test_the_terms_of_a_sum_stand_below_the_score(wide):
    """Where there is one term alone, it says what the score says."""
    one = {"objective/scores": 1.5, "objective/kl": 0.5, "objective/scores/rm": 1.0}
    several = one | {"objective/scores/brief": 0.25}

    def shown(kind, numbers):
        screen = Screen(kind)
        with screen.console.progress("ppo", 9):
            screen.console.metrics("ppo", 1, 9, numbers)
            if kind is Terminal:
                screen.console._live.refresh()
                text = Glass(screen.err.getvalue(), 100).text
            else:
                text = screen.err.getvalue()
        return re.findall(r"objective/\S+", text)

    for kind in (Terminal, io.StringIO):
        assert shown(kind, one) == ["objective/scores", "objective/kl"]
        assert shown(kind, several) == [
            *("objective/scores", "objective/scores/rm", "objective/scores/brief", "objective/kl")
        ]


def test_the_table_is_gone_with_its_stage(wide):
    screen = Screen(Terminal)
    stage(screen, [1])
    with screen.console.progress("rm", 2) as bar:
        bar.advance()
        screen.console._live.refresh()
    assert Glass(screen.err.getvalue(), 100).text.count("objective/kl") == 1
    screen.console.metrics("ppo", 9, 9, {"objective/kl": 4.0})  # nothing is live: a line
    assert Glass(screen.err.getvalue(), 100).text.endswith("[ppo] step 9/9  objective/kl 4\n")


def test_nested_bars_come_and_go_below_the_table(wide):
    screen = Screen(Terminal)
    with screen.console.progress("ppo", 2) as bar:
        screen.console.metrics("ppo", 1, 2, {"objective/kl": 0.5})
        with screen.console.progress("evaluate", 4, "prompts") as inner:
            inner.advance()
            screen.console._live.refresh()
            seen = Glass(screen.err.getvalue(), 100)
            assert not seen.cursor
            assert "evaluate" in seen.text
        bar.advance()
    glass = Glass(screen.err.getvalue(), 100)
    assert "evaluate" not in glass.text
    assert glass.text.count("objective/kl") == 1


@pytest.mark.parametrize(("columns", "lines"), [(100, 40), (70, 12), (40, 40), (24, 6)])
def test_the_picture_fits_the_terminal(monkeypatch, columns, lines):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    screen = Screen(Terminal)
    numbers = dict.fromkeys(HEADLINES["ppo"], 0.123456)
    with screen.console.progress("ppo", 3) as bar:
        for step in (1, 2, 3):
            bar.advance()
            screen.console.metrics("ppo", step, 3, numbers)
            screen.console._live.refresh()
    glass = Glass(screen.err.getvalue(), columns)
    assert glass.text.count("step 3/3") == 1
    assert len(glass.lines) - 1 <= lines, "nothing was left behind by a refresh"
    assert max(map(len, glass.lines)) <= columns
    assert re.search(r"last\b", glass.text)
    assert "0.1235" in glass.text


def test_a_terminal_that_is_resized_meanwhile_stays_usable(monkeypatch):
    screen = Screen(Terminal)
    with screen.console.progress("ppo", 4) as bar:
        for columns in (100, 30, 5, 120):
            monkeypatch.setenv("COLUMNS", str(columns))
            bar.advance()
            screen.console.metrics("ppo", 1, 4, {"objective/kl": 0.5})
            screen.console._live.refresh()
    assert screen.console._live is None
    assert screen.err.getvalue().count("\x1b[?25l") == screen.err.getvalue().count("\x1b[?25h")


def test_ctrl_c_leaves_the_last_table_and_the_cursor(wide):
    screen = Screen(Terminal)

    def interrupted():
        with screen.console.progress("ppo", 4) as bar, screen.console.progress("evaluate", 4):
            bar.advance()
            screen.console.metrics("ppo", 1, 4, {"objective/kl": 0.5})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    glass = Glass(screen.err.getvalue(), 100)
    assert glass.cursor
    assert "objective/kl" in glass.text
    assert "evaluate" not in glass.text
    screen.console.note("afterwards")
    assert Glass(screen.err.getvalue(), 100).text.endswith("afterwards\n")


def test_the_best_is_the_first_of_equals_and_never_no_number():
    board = Board("ppo", ["eval/score", "objective/kl"], None)
    for step, score in enumerate([float("nan"), 1.0, 2.0, 2.0, float("inf")], start=1):
        board.take(step, {"eval/score": score, "objective/kl": 5.0 - score})
    seen = rich.console.Console(width=100, file=io.StringIO())
    seen.print(board.table(100, 40))
    rows = [line.split() for line in seen.file.getvalue().splitlines() if "/" in line]
    assert rows[0][:5] == ["eval/score", "nan", "2", "@3", "inf"]
    assert rows[1][:5] == ["objective/kl", "nan", "3", "@3", "-inf"]


def test_numbers_may_come_while_the_table_is_drawn():
    board = Board("ppo", ["objective/kl"], None)
    board.take(0, {"objective/kl": 0.0})
    done = threading.Event()

    def numbers():
        while not done.is_set():
            board.take(1, {"objective/kl": 1.0})

    writer = threading.Thread(target=numbers)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    writer.start()
    try:
        for _ in range(1000):
            board.table(100, 40)
    finally:
        done.set()
        writer.join()
        sys.setswitchinterval(before)


def test_trends():
    assert trend([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert trend([2.0, float("nan"), 1.0]) == "█ ▁"
    assert trend([3.0, 3.0]) == "▅▅"
    assert trend([]) == trend([float("inf")]) == ""


def test_a_terminal_of_ascii_has_no_plots(wide):
    class Old(Terminal):
        encoding = "ascii"

    screen = Screen(Old)
    stage(screen, [1, 2])
    assert screen.err.getvalue().isascii()


# -- lines and tables


def test_metrics_are_one_line_of_what_matters_for_the_stage():
    screen = Screen()
    numbers = {"policy/approxkl": 0.0123456, "objective/scores": 1.0, "episode": 64.0}
    screen.console.metrics("ppo", 3, 100, numbers)
    screen.console.metrics("sft", 3, None, {"train/loss": float("nan"), "eval/loss": 1234.56})
    screen.console.metrics("rm", 3, None, {"time/total": 1.0})
    assert screen.lines == [
        "[ppo] step 3/100  objective/scores 1  policy/approxkl 0.01235",
        "[sft] step 3  train/loss nan  eval/loss 1235",
    ]


def test_a_note_is_one_line_with_its_brackets():
    screen = Screen()
    text = "[sft] [bold]kept[/bold] :smile: " + "long/path/" * 20
    screen.console.note(text)
    assert screen.lines == [text]


def test_tables_go_to_stderr_and_the_summary_to_stdout():
    screen = Screen()
    screen.console.table("step 0", [("largest |KL|", "3e-07 nats")])
    assert re.search(r"step 0\n.*\n.*largest \|KL\| . 3e-07 nats", screen.err.getvalue())
    assert screen.out.getvalue() == ""
    path = "/".join(["runs", *["deep"] * 40])
    screen.console.summary("SFT", [("eval/loss", "1.234")], published=path)
    assert "1.234" in screen.out.getvalue()
    assert f"published: {path}\n" in screen.out.getvalue()  # whole, to copy
    assert "1.234" not in screen.err.getvalue()
    screen.console.summary("SFT", [("eval/loss", "1.2")], published=None)
    assert screen.out.getvalue().count("published") == 1


def test_samples_stand_side_by_side_with_their_verdicts():
    screen = Screen()
    screen.console.samples(
        [
            {
                "prompt": "Cheer me up.",
                "sft": "No.",
                "sft_score": -1.25,
                "sft_gold": 0.2,
                "ppo": "You can do it!",
                "ppo_score": 2.0,
                "ppo_gold": 0.9375,
            },
            {"prompt": "Describe rain.", "sft": "wet " * 1000, "ppo": "", "ppo_score": 0},
        ]
    )
    text = screen.err.getvalue()
    assert re.search(r"Cheer me up\. .* No\. .* You can do it!", text)
    assert re.search(r"\(score -1\.250, gold 0\.200\) .*\(score 2\.000, gold 0\.938\)", text)
    assert "(score 0.000)" in text
    assert "[...]" in text
    assert max(map(len, text.splitlines())) == 100
    assert len(text.splitlines()) < 60


def test_text_of_a_model_cannot_steer_the_terminal():
    screen = Screen(Terminal)
    screen.console.samples(
        [{"prompt": "a\x1b]0;title\x07b", "sft": "c\rd\x9b2Je", "ppo": "[red]x"}]
    )
    screen.console.note("\x1b[2Jnote")
    text = re.sub(r"\x1b\[[\d;]*m", "", screen.err.getvalue())  # rich's own styles
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "[red]x" in text


def test_a_stream_that_knows_only_ascii_is_no_crash():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    console = Console(err=stream, out=stream)
    console.note("café")
    console.summary("Zusammenfassung für alle", [("größe", "1")], published="runs/é")
    console.samples([{"prompt": "naïve", "sft": "a", "ppo": "b"}])
    stream.flush()
    assert b"caf?" in raw.getvalue()
    assert b"published: runs/?" in raw.getvalue()


def test_quiet_shows_nothing_at_all():
    for stream in (io.StringIO, Terminal):
        screen = Screen(stream, quiet=True)
        console = screen.console
        with console.progress("ppo", 2) as bar, console.progress("evaluate", 2):
            screen.clock.now += 30
            bar.advance()
        console.note("note")
        console.metrics("sft", 0, 1, {"train/loss": 1.0})
        console.table("t", [("a", "b")])
        console.summary("t", [("a", "b")], published="runs/x")
        console.samples([{"prompt": "p", "sft": "s", "ppo": "q"}])
        assert screen.err.getvalue() == screen.out.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0s"),
        (7.4, "7s"),
        (59.6, "1m 00s"),
        (65, "1m 05s"),
        (3599.7, "1h 00m"),
        (7384, "2h 03m"),
    ],
)
def test_durations_read_well(seconds, words):
    assert duration(seconds) == words
