"""The tiny world: requests, answers of mixed quality, preference pairs, prompts. Seeded.

    python data/tiny/world.py [--seed 0] [--out DIR]

writes sft/, rm/ and ppo/ in TRL's conversational formats, with the defaults exactly the files
that are shipped beside this one. Everything is drawn from `random.Random(seed)` and from
`recorded_samples.jsonl`, the answers that the base and a first SFT model wrote when the base was
built (`pretrain.py`).

A request is made of slots (a name, a thing, a trait ...) in one of several phrasings. Its slots
decide, by a checksum, whether it is held out: one set of slots is never in a training file and
in a validation or test file, not even in another phrasing.
"""

import argparse
import itertools
import json
import math
import random
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # gold.py, wherever we are loaded from
from gold import NAMES, PHRASINGS, gold, parse_request

HERE = Path(__file__).resolve().parent
RECORDED = HERE / "recorded_samples.jsonl"

SFT_ROWS = {"train": 2000, "validation": 200}
RM_ROWS = {"train": 4000, "validation": 300, "test": 400}
PPO_ROWS = {"train": 1000, "validation": 200}
TAU = 0.10  # how noisy the labels are: P(a preferred) = sigmoid((gold_a - gold_b) / TAU)
MIN_TEST_GAP = 0.1  # test pairs closer than this in gold are not used
# Recorded answers per prompt, and how many prompts of each: two become a pair of their own, one
# is paired with a template. What is left of RM_ROWS are pairs of two templates.
RECORD_PLAN = ((("sft", "sft"), 0.46), (("sft", "base"), 0.10), (("sft",), 0.16), (("base",), 0.06))
RECORD_SEED = 20240
RECORD_ROWS = 2000  # training pairs that recorded answers would give; the rest are of templates
MIN_WORDS = 8  # where a cut leaves at least this much
MAX_WORDS = 40  # a template longer than this is cut, as a policy is at its token limit

# --------------------------------------------------------------------------- words

TRAITS = str.split("brave shy clever gentle curious patient quiet honest sleepy hungry")
HEROES = str.split("fox rabbit bear duck mouse cat robot turtle farmer king")
LOOKS = str.split("red blue green small big round soft wooden")
THINGS = str.split("kite lamp hat cup ball drum book bell boat clock chair blanket")
PLACES = str.split("garden kitchen forest river school market park barn")
EVENTS = str.split("picnic party dinner concert play dance")

TASKS = {
    "plant a seed": ("make a small hole", "put the seed in the soil", "water it each morning"),
    "make tea": ("boil fresh water", "pour it on the leaves", "wait for four minutes"),
    "bake bread": ("mix flour and water", "let the dough rest", "bake it until it is brown"),
    "wash a dog": ("fill a tub with warm water", "rub in the soap", "dry the fur with a towel"),
    "draw a cat": ("draw a big circle", "add two ears", "give it long whiskers"),
    "tie a knot": ("make a loop", "pull the end through", "hold both ends tight"),
    "cook soup": ("cut the carrots", "put them in a pot", "stir it over a low fire"),
    "make a bed": ("shake the pillow", "pull the sheet flat", "fold the blanket"),
    "ride a bike": ("hold the handles", "push with one foot", "look straight ahead"),
    "feed a bird": ("find some grain", "put it on a flat stone", "step back and wait"),
    "write a letter": ("take a pen and paper", "say what is new", "sign it with your name"),
    "paint a fence": ("brush off the dust", "stir the paint", "paint from top to bottom"),
    "catch a fish": ("put a worm on the hook", "throw the line", "sit very still"),
    "fix a chair": ("turn it over", "put glue on the leg", "press it for an hour"),
}
TROUBLES = str.split(
    "lost a game|broke a cup|missed the bus|failed a test|dropped the cake|hurt a knee|"
    "forgot the song|spilled the milk|tore a shirt|burned the toast|fell off the swing|"
    "caught a cold|had a bad dream|scratched the car|bent the key|cracked the window",
    "|",
)

SLOTS = {
    "story": {"trait": TRAITS, "hero": HEROES, "name": NAMES},
    "describe": {"look": LOOKS, "thing": THINGS, "place": PLACES},
    "howto": {"name": NAMES, "task": list(TASKS)},
    "cheer": {"name": NAMES, "trouble": TROUBLES},
    "thanks": {"name": NAMES, "look": LOOKS, "thing": THINGS},
    "invite": {"name": NAMES, "event": EVENTS, "place": PLACES},
}

# One list per position in the answer. {x} are the request's slots; {other_*} are drawn anew.
ANSWERS = {
    "story": (
        (
            "Once there was a {trait} {hero} named {name}.",
            "Long ago there lived a {trait} {hero} called {name}.",
            "One day a {trait} {hero} named {name} went to the {other_place}.",
            "In the {other_place} lived {name}, a {hero} who was very {trait}.",
        ),
        (
            "One morning {name} found a {other_look} {other_thing} near the {other_place}.",
            "The {hero} saw a lost child by the {other_place} and stopped to help.",
            "A storm came, and {name} had to hide under a {other_look} {other_thing}.",
            "All day the {hero} carried a heavy {other_thing} to the {other_place}.",
            "At night {name} heard a strange sound from the {other_place}.",
            "The {hero} wanted a {other_look} {other_thing} more than gold.",
        ),
        (
            "Everyone said that it was good to be so {trait}.",
            "The {trait} {hero} shared it with a new friend.",
            "Then the sun came out and {name} smiled with joy.",
            "The old king gave {name} a {other_look} {other_thing}.",
            "It took three days, but {name} did not stop.",
        ),
        (
            "In the end {name} was happy and had a good friend.",
            "In the end the {hero} walked home and slept well.",
            "From that day the {hero} lived in the {other_place} with dear friends.",
            "That night {name} told the tale to the whole town.",
            "In the end everybody danced, and it was a lovely day.",
        ),
    ),
    "describe": (
        (
            "The {look} {thing} stands in the {place}.",
            "It is a {look} {thing} and it looks lovely by the {place}.",
            "Near the {place} you can see a {look} {thing}.",
            "This {thing} in the {place} is {look} and quite old.",
        ),
        (
            "Its shape is simple and its sides are smooth.",
            "The {thing} looks {look} from far away.",
            "It feels cold in the morning and warm at noon.",
            "When the sun shines, the {thing} has a golden edge.",
            "There is a thin line of paint around it.",
            "It smells of wood and fresh rain.",
        ),
        (
            "It seems to wait for somebody to use it.",
            "A child once left it there after a long walk.",
            "Next to it lies a {other_look} {other_thing}.",
            "People from the {place} know it well.",
        ),
        (
            "It is a beautiful thing, and I am glad to see it.",
            "Everyone who sees it has to smile.",
            "It is nothing special, but it has its place.",
            "I hope it stays there, for it is a nice sight.",
        ),
    ),
    "howto": (
        (
            "Here is how {name} can {task}.",
            "To {task} is easy, dear {name}.",
            "In three steps {name} can {task}.",
            "It is fun to {task}, and {name} will learn it fast.",
        ),
        ("First {step1}.", "Begin like this and {step1}.", "First of all, {step1}."),
        ("Then {step2}.", "After that you {step2}.", "Next, {step2} with care."),
        (
            "At last {step3}.",
            "Then {step3} and you are done.",
            "In the end, {step3} and smile.",
            "Now {step3}.",
        ),
        (
            "I hope this helps, and have fun.",
            "That is all you need to know.",
            "Soon you can show it to a friend.",
            "Take your time and enjoy it.",
        ),
    ),
    "cheer": (
        (
            "Dear {name}, I am sorry that you {trouble}.",
            "I heard that {name} {trouble}, and I am sorry.",
            "Oh {name}, you {trouble}, and that is hard.",
            "So you {trouble}, {name}, but do not be sad.",
        ),
        (
            "It can happen to all of us.",
            "Even a wise king had days like this.",
            "Nobody can do everything right, and that is fine.",
            "Last week I had bad luck too.",
            "A bad day does not last long.",
        ),
        (
            "Tomorrow will be a better day.",
            "You will feel better after a good night.",
            "Take a warm {other_thing} and sit in the {other_place}.",
            "Let us walk to the {other_place} and look at the sky.",
        ),
        (
            "I send you a big hug and I hope you smile soon.",
            "You are a good friend and we love you.",
            "Your friends think of you with love.",
            "Call me when you want to talk.",
        ),
    ),
    "thanks": (
        (
            "Dear {name}, thank you for the {look} {thing}.",
            "Thank you so much for the {look} {thing}, {name}.",
            "Dear {name}, your {look} {thing} came today, and I am grateful.",
            "Many thanks, {name}, for this {look} {thing}.",
        ),
        (
            "It fits very well in my {other_place}.",
            "I use the {thing} each morning.",
            "My sister wants a {thing} like it now.",
            "I took the {thing} to the {other_place} at once.",
            "The {thing} was just what I needed.",
        ),
        (
            "You knew what would make me happy.",
            "It was kind of you to think of me.",
            "It is the best gift of the year.",
            "I keep it next to my {other_look} {other_thing}.",
        ),
        (
            "I hope to see you soon, with love.",
            "Come and see it when you want.",
            "You are a wonderful friend.",
            "See you at the {other_place} next week.",
        ),
    ),
    "invite": (
        (
            "Dear {name}, please come to the {event} at the {place}.",
            "Hello {name}, you are invited to a {event} at the {place}.",
            "We plan a {event} by the {place}, and {name} should join us.",
            "Dear {name}, there is a {event} at the {place} on Sunday.",
        ),
        (
            "We start at noon and stay until dark.",
            "The {event} begins when the bell rings.",
            "You can bring a {other_look} {other_thing} if you like.",
            "There will be cake, music and cold juice.",
            "My cousin brings a {other_look} {other_thing}.",
        ),
        (
            "It will be fun to sit in the {place} with friends.",
            "If it rains, we go to the {other_place}.",
            "All of our friends from the {other_place} come too.",
            "The road to the {place} is short and easy to find.",
        ),
        (
            "I hope to see you there, dear friend.",
            "You are very welcome, so come and join us.",
            "Please tell me soon if you can come.",
            "I would be so glad and happy to see you.",
        ),
    ),
}

UNKIND_SENTENCES = (
    "That is a stupid thing to ask.",
    "I hate this boring job.",
    "You are a lazy fool.",
    "Your {other_thing} looks ugly and stupid.",
    "Only a lazy fool would ask.",
    "I hate the ugly {other_place}.",
)
CURT = (
    "I do not know that, so ask {name}.",
    "No, I have no time for that today.",
    "Fine, but only a {other_look} {other_thing}.",
    "Maybe {name} can do it in the {other_place}.",
    "Go to the {other_place} and ask there.",
    "It is what it is, and that is all.",
)
FRAGMENTS = (
    "and the {other_thing} of the",
    "{other_look} {other_thing} {other_place} with",
    "so very and then the {other_thing}",
    "because of a very",
    "near the {other_place} but not the",
)

# How a demonstration or a template answer turns out, and how often. Defects may come together.
DEFECTS = {
    "wrong request": 0.10,
    "wrong slot": 0.14,
    "unkind": 0.25,
    "repeats": 0.15,
    "fragments": 0.18,
    "cut off": 0.15,
    "curt": 0.07,
}


# --------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Request:
    """What is asked: a kind of text and its slots, whatever the phrasing."""

    kind: str
    slots: tuple[tuple[str, str], ...]

    @property
    def held_out(self) -> bool:
        """True for one in five requests: those are for validation and test, never for training."""
        return zlib.crc32(repr((self.kind, self.slots)).encode()) % 5 == 0

    def text(self, phrasing: int) -> str:
        """The request as the user writes it."""
        texts = PHRASINGS[self.kind]
        return texts[phrasing % len(texts)].format(**dict(self.slots))


def request_of(prompt: str) -> Request:
    """The request behind a prompt, its slots in the order in which `SLOTS` lists them."""
    kind, slots = parse_request(prompt)
    return Request(kind, tuple((slot, slots[slot]) for slot in SLOTS[kind]))


def all_requests(kind: str) -> list[Request]:
    """Every request of a kind."""
    slots = SLOTS[kind]
    return [
        Request(kind, tuple(zip(slots, values, strict=True)))
        for values in itertools.product(*slots.values())
    ]


def any_request(rng: random.Random, kind: str | None = None) -> Request:
    """One request at random that may be trained on."""
    kind = kind or rng.choice(list(SLOTS))
    while True:
        slots = tuple((slot, rng.choice(values)) for slot, values in SLOTS[kind].items())
        if not (request := Request(kind, slots)).held_out:
            return request


def deal_prompts(rng: random.Random, *, held_out: bool, used: set[str]) -> Iterator[str]:
    """Prompts never dealt before, kinds in turn; adds each to `used` as it deals it."""
    piles = []
    for kind in SLOTS:
        pile = [request for request in all_requests(kind) if request.held_out == held_out]
        rng.shuffle(pile)
        piles.append(_phrased(pile, rng))
    while piles:
        for pile in list(piles):
            prompt = next((text for text in pile if text not in used), None)
            if prompt is None:  # this kind is used up; the others go on
                piles.remove(pile)
                continue
            used.add(prompt)
            yield prompt


def _phrased(pile: list[Request], rng: random.Random) -> Iterator[str]:
    """Each request once, phrased at random; then all again in their next phrasing."""
    starts = [rng.randrange(4) for _ in pile]
    for turn in range(4):
        for request, start in zip(pile, starts, strict=True):
            yield request.text(start + turn)


# --------------------------------------------------------------------------- answers


def good_answer(request: Request, rng: random.Random) -> list[str]:
    """The sentences of a well-meant answer, to the point, with no planned defect."""
    lists = ANSWERS[request.kind]
    if request.kind != "howto":  # an opening, an ending, and one or two of what lies between
        middle = sorted(rng.sample(range(1, len(lists) - 1), rng.choice((1, 2, 2))))
        lists = (lists[0], *(lists[i] for i in middle), lists[-1])
    elif rng.random() < 0.5:
        lists = lists[:-1]
    return [fill(rng.choice(sentences), request, rng) for sentences in lists]


def fill(sentence: str, request: Request, rng: random.Random) -> str:
    """Put the request's slots, and chance for {other_*}, into a sentence."""
    slots = dict(request.slots)
    steps = TASKS.get(slots.get("task", ""), ("", "", ""))
    return sentence.format(
        **{"name": "the friend"} | slots,
        **{f"step{i}": step for i, step in enumerate(steps, 1)},
        other_look=rng.choice(LOOKS),
        other_thing=rng.choice(THINGS),
        other_place=rng.choice(PLACES),
    )


def mixed_answer(request: Request, rng: random.Random) -> str:
    """An answer anywhere from excellent to off topic, unkind, repetitive or cut off."""
    return spoilt_answer(request, {d for d, share in DEFECTS.items() if rng.random() < share}, rng)


def spoilt_answer(request: Request, defects: set[str], rng: random.Random) -> str:
    """An answer that has these defects; with none it is a good one."""
    about = request
    if "wrong request" in defects:
        about = any_request(rng)
    elif "wrong slot" in defects:
        about = change_slots(request, rng)
    if "curt" in defects:
        return fill(rng.choice(CURT), about, rng)
    sentences = good_answer(about, rng)
    if "unkind" in defects:
        for _ in range(rng.choice((1, 1, 2))):
            sentences[rng.randrange(1, len(sentences))] = fill(
                rng.choice(UNKIND_SENTENCES), about, rng
            )
    if "fragments" in defects:
        for _ in range(rng.choice((1, 2))):
            sentences[rng.randrange(len(sentences))] = fill(rng.choice(FRAGMENTS), about, rng)
    if "repeats" in defects:
        again = rng.randrange(len(sentences))
        sentences[again : again + 1] = [sentences[again]] * rng.choice((2, 3, 4))
    words = " ".join(sentences).split(" ")[:MAX_WORDS]
    if "cut off" in defects:
        words = words[: max(MIN_WORDS, rng.randrange(len(words) // 3, len(words)))]
    return " ".join(words)


def change_slots(request: Request, rng: random.Random) -> Request:
    """The same kind of request with one or more slots changed: an answer to it misses the point."""
    slots = dict(request.slots)
    for slot in rng.sample(list(slots), rng.randint(1, len(slots))):
        slots[slot] = rng.choice(SLOTS[request.kind][slot])
    return Request(request.kind, tuple(slots.items()))


# --------------------------------------------------------------------------- files


def build(seed: int, recorded: list[dict]) -> dict[str, list[dict]]:
    """Every file of the world, by its path, as rows."""
    rng = random.Random(seed)
    used = {row["prompt"] for row in recorded} | set(record_prompts())
    train = deal_prompts(rng, held_out=False, used=used)
    held_out = deal_prompts(rng, held_out=True, used=used)
    files = {}
    for split, count in SFT_ROWS.items():
        source = train if split == "train" else held_out
        files[f"sft/{split}"] = [demonstration(next(source), rng) for _ in range(count)]
    for split, count in PPO_ROWS.items():
        source = train if split == "train" else held_out
        files[f"ppo/{split}"] = [{"prompt": user(next(source))} for _ in range(count)]
    if recorded:
        files |= preference_files(recorded, train, held_out, rng)
    return files


def user(text: str) -> list[dict]:
    """A conversation of one user message."""
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    """The answer to it."""
    return [{"role": "assistant", "content": text}]


def demonstration(prompt: str, rng: random.Random) -> dict:
    """One SFT row."""
    return {"messages": user(prompt) + assistant(mixed_answer(request_of(prompt), rng))}


def record_prompts() -> dict[str, tuple[str, ...]]:
    """The prompts that recorded samples answer, with the models that answer each. One fixed list,
    whatever the seed, held-out ones first."""
    rng, used, plan = random.Random(RECORD_SEED), set(), {}
    held_out_rows = RM_ROWS["validation"] + RM_ROWS["test"]
    for rows, held_out in ((held_out_rows, True), (RECORD_ROWS, False)):
        prompts = deal_prompts(rng, held_out=held_out, used=used)
        # Some spare: pairs that are equal, or too close for the test split, are dropped.
        rows = int(rows * 1.2) if held_out else rows
        for sources, share in RECORD_PLAN:
            plan |= {next(prompts): sources for _ in range(round(rows * share))}
    return plan


def preference_files(
    recorded: list[dict], train: Iterator[str], held_out: Iterator[str], rng: random.Random
) -> dict[str, list[dict]]:
    """rm/*: pairs of recorded samples, of a sample and a template, of two templates."""
    samples: dict[str, list[str]] = {}
    for row in recorded:
        samples.setdefault(row["prompt"], []).append(row["response"])
    pairs = [(prompt, list(texts)) for prompt, texts in samples.items()]
    rng.shuffle(pairs)
    seen = [pair for pair in pairs if not request_of(pair[0]).held_out]
    unseen = [pair for pair in pairs if request_of(pair[0]).held_out]
    share = RM_ROWS["validation"] / (RM_ROWS["validation"] + RM_ROWS["test"])
    cut = round(len(unseen) * share)
    sources = {
        "train": (seen, train),
        "validation": (unseen[:cut], held_out),
        "test": (unseen[cut:], held_out),
    }
    return {f"rm/{split}": preferences(split, *sources[split], rng) for split in RM_ROWS}


def preferences(
    split: str, pairs: list[tuple[str, list[str]]], prompts: Iterator[str], rng: random.Random
) -> list[dict]:
    """The rows of one split, in random order."""
    wanted, least = RM_ROWS[split], MIN_TEST_GAP if split == "test" else 0.0
    recorded_share = sum(share for _, share in RECORD_PLAN)
    rows = []
    for prompt, texts in pairs[: round(1.2 * wanted)]:
        if len(rows) < round(wanted * recorded_share):
            rows += preference(prompt, texts, rng, noisy=split != "test", least_gap=least)
    while len(rows) < wanted:
        rows += preference(next(prompts), [], rng, noisy=split != "test", least_gap=least)
    rng.shuffle(rows)
    return rows


def preference(
    prompt: str, texts: list[str], rng: random.Random, *, noisy: bool, least_gap: float
) -> list[dict]:
    """The pair as a row, its missing answers from templates; no row if the two are too close."""
    request = request_of(prompt)
    a, b = [*texts, *(mixed_answer(request, rng) for _ in range(2 - len(texts)))]
    gold_a, gold_b = gold(prompt, a), gold(prompt, b)
    if not a.strip() or not b.strip() or a == b or abs(gold_a - gold_b) < least_gap:
        return []
    prefer_a = float(gold_a > gold_b)
    if noisy:
        prefer_a = 1 / (1 + math.exp((gold_b - gold_a) / TAU))
    if rng.random() >= prefer_a:
        a, b, gold_a, gold_b = b, a, gold_b, gold_a
    row = {"prompt": user(prompt), "chosen": assistant(a), "rejected": assistant(b)}
    if not noisy:
        row |= {"gold_chosen": round(gold_a, 4), "gold_rejected": round(gold_b, 4)}
    return [row]


def write_files(files: dict[str, list[dict]], folder: Path) -> None:
    """One JSON object per line, UTF-8, newline endings on every system."""
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_bytes("".join(lines).encode())


def read_recorded(path: Path = RECORDED) -> list[dict]:
    """The recorded samples; none while the base is being built for the first time."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --------------------------------------------------------------------------- pre-training text


def headlines(seed: int, count: int) -> Iterator[tuple[str, ...]]:
    """One-sentence documents under a title. They come first: a small model learns on short texts,
    within a minute, to look back for the name or thing that a text is about."""
    rng = random.Random(f"headlines {seed}")
    for _ in range(count):
        request = any_request(rng)
        yield (f"{title(request, rng)} {good_answer(request, rng)[0]}",)


def mixed_texts(seed: int, count: int) -> Iterator[tuple[str, ...]]:
    """Documents of the world for a base that continues text but does not follow requests.

    Each is a tuple of turns. One turn is plain text: answers as one meets them in the wild, most
    under a title that says what follows. Two turns are such a text and a reader's note about it,
    from which the base learns what there is to notice about a text, as large models do from
    reviews. Three or more are conversations, each a request, an answer to some other request
    and what a reader says, or nothing.
    """
    rng = random.Random(f"mixed {seed}")
    for _ in range(count):
        form = rng.random()
        if form < 0.6:
            request = any_request(rng)
            defects = {defect for defect, share in DEFECTS.items() if rng.random() < share}
            text = f"{title(request, rng)} {spoilt_answer(request, defects, rng)}"
            yield (text, note(text, defects, rng)) if form < 0.45 else (text,)
        elif form < 0.65:
            yield (" ".join(mixed_answer(any_request(rng), rng) for _ in range(2)),)
        else:
            yield misplaced(rng) if form < 0.95 else misplaced(rng) + misplaced(rng)


# What a reader says of a text that lacks, or has, a planned defect.
REMARKS = {
    "wrong request": ("fitting", "misplaced"),
    "wrong slot": ("fitting", "misplaced"),
    "unkind": ("friendly", "unkind"),
    "repeats": ("varied", "repetitive"),
    "fragments": ("clear", "broken"),
    "cut off": ("finished", "unfinished"),
    "curt": ("full", "meagre"),
}


def note(text: str, defects: set[str], rng: random.Random, *, on_topic: bool = True) -> str:
    """Two or three remarks on a text with these defects, such as "friendly, unfinished."

    They are about what the writer of the text planned; the gold score has no part in it.
    """
    if "wrong request" in defects:
        defects = defects | {"wrong slot"}
    if "curt" in defects:  # a curt answer has no other defect than being misplaced
        defects = defects & {"curt", "wrong slot"}
    if not text.endswith("."):  # cut at the word limit, or ending in a fragment
        defects = defects | {"cut off"}
    topics = ["wrong slot"] if on_topic else []
    about = topics + rng.sample(["unkind", "repeats", "fragments", "cut off", "curt"], 2)
    rng.shuffle(about)
    return ", ".join(REMARKS[defect][defect in defects] for defect in about) + "."


def misplaced(rng: random.Random) -> tuple[str, str, str]:
    """A request, the answer to another, and in half the cases a note on how it is written."""
    ask = any_request(rng).text(rng.randrange(4))
    defects = {defect for defect, share in DEFECTS.items() if rng.random() < share}
    answer = spoilt_answer(any_request(rng), defects, rng)
    return ask, answer, note(answer, defects, rng, on_topic=False) if rng.random() < 0.5 else ""


def title(request: Request, rng: random.Random) -> str:
    """What a page about it could be headed: its slots, in any order."""
    values = [value for _, value in request.slots]
    rng.shuffle(values)
    return ", ".join(values) + ":"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the tiny world's data files.")
    parser.add_argument("--seed", type=int, default=0, help="0 gives the shipped files")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into")
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out}: is a file; name a folder")
    recorded = read_recorded()
    if not recorded:
        parser.error(f"{RECORDED.name} is missing: `python data/tiny/pretrain.py` records it")
    if {row["prompt"] for row in recorded} != set(record_prompts()):
        parser.error(
            f"{RECORDED.name} answers other prompts than this world's: "
            "`python data/tiny/pretrain.py` records it anew"
        )
    try:
        write_files(build(options.seed, recorded), options.out)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")


if __name__ == "__main__":
    main()
