"""The gold score: a transparent judge of answers in the tiny world, 0 (bad) to 1 (good).

It labels the preference pairs (through a noisy draw, see `world.py`) and measures afterwards;
training never sees it. It reads the request, so it knows what was asked. With the six parts of
`gold_parts`, each in [0, 1]:

    gold = product over the parts of 1 - weight * (1 - part)

so a perfect answer scores 1 and each part that is wholly missing takes away its weight:
on_topic 0.5, kind 0.5, sentences 0.5, fresh 0.5, length 0.5, ending 0.4. An answer without a
word scores 0.

    on_topic   share of what the request names that the answer mentions, over its slots (the
               name, the thing, the trait ...) and one cue of the kind of text asked for ("first"
               in a how-to, "thank" in a thank-you note); halved if it names somebody else.
               With nothing asked that this file can parse, the share of the request's content
               words.
    sentences  share of the sentences that are complete: capital letter first, 3 to 22 words, a
               verb, no word twice in a row, no dangling last word ("the", "and"), a full stop.
    kind       0.5, plus 0.25 for each different warm word up to two ("glad", "dear" ...), minus
               0.5 for each unkind word.
    fresh      1 minus twice the share of three-word runs that were already said.
    length     1 from 12 to 38 words, falling in a straight line to 0 at 0 and at 62 words.
    ending     1 if the last sentence ends in a full stop, ! or ? and is complete, else 0.

What would maximise it: two to four different full sentences, 12 to 38 words in all, that mention
everything the request names, say one cue word of the kind, and hold two warm words. No fixed
text can do so, since names, things and traits change with the request: the best fixed answer
off topic averages 0.56. Limits, on purpose: it counts words and shapes, it does not
understand. A fluent text that mentions the right words in a senseless order scores well.
"""

import itertools
import math
import re

NAMES = str.split("Mia Ben Tom Lily Sam Anna Max Rosa Leo Nina Jack Ella Omar Kate Paul Ruby")

# How much of the score a part takes away when it is wholly missing.
WEIGHTS = {
    "on_topic": 0.5,
    "sentences": 0.5,
    "kind": 0.5,
    "fresh": 0.5,
    "length": 0.5,
    "ending": 0.4,
}

# How each kind of request is put. `world.py` fills these in; the judge reads them backwards.
PHRASINGS = {
    "story": (
        "Write a short story about a {trait} {hero} named {name}.",
        "Tell me a story about {name}, a {trait} {hero}.",
        "Please make up a tale about the {trait} {hero} {name}.",
        "I want a story with a {hero} called {name} who is {trait}.",
    ),
    "describe": (
        "Describe a {look} {thing} in the {place}.",
        "What does a {look} {thing} in the {place} look like?",
        "Tell me about the {look} {thing} near the {place}.",
        "Please paint in words a {look} {thing} by the {place}.",
    ),
    "howto": (
        "Explain to {name} how to {task}.",
        "How can {name} {task}?",
        "{name} wants to {task}. What are the steps?",
        "Please show {name} how to {task}.",
    ),
    "cheer": (
        "Cheer up {name}, who {trouble}.",
        "My friend {name} {trouble}. Say something nice.",
        "{name} is sad and {trouble}. What can I write?",
        "Help me comfort {name}, who {trouble}.",
    ),
    "thanks": (
        "Write a thank-you note to {name} for the {look} {thing}.",
        "Help me thank {name} for a {look} {thing}.",
        "{name} gave me a {look} {thing}. Write a short thank-you note.",
        "I got a {look} {thing} from {name}. How do I say thanks?",
    ),
    "invite": (
        "Invite {name} to a {event} at the {place}.",
        "Ask {name} to come to my {event} at the {place}.",
        "Write a note to invite {name} to the {event} by the {place}.",
        "I plan a {event} at the {place}. Help me ask {name}.",
    ),
}

CUES = {
    "story": {"once", "ago", "day", "end"},
    "describe": {"looks", "feels", "stands", "seems", "shape"},
    "howto": {"first", "start", "begin"},
    "cheer": {"sorry", "better", "hug", "tomorrow"},
    "thanks": {"thank", "thanks", "grateful"},
    "invite": {"come", "join", "invited"},
}

WARM = set(
    str.split(
        "glad happy love smile smiled friend friends dear hope joy nice lovely wonderful "
        "hug care thank thanks grateful best kind sweet fun welcome beautiful"
    )
)
UNKIND = set(str.split("stupid lazy hate boring fool ugly dumb useless awful silly worst terrible"))
VERBS = set(
    str.split(
        "is are am was were be has have had do does did can could will would may makes make made "
        "goes go went comes come came looks look looked feels feel felt stands stand stood lies "
        "lived lives live found find saw see sees said say told tell knew know knows thank love "
        "loves loved hope wish want wants wanted need needs take takes took put puts keep kept "
        "wait let stir mix cut fold press hold wash fill cover add pour draw turn tie check shake "
        "open close give gives gave brought bring helped help helps walked walk ran run sat sit "
        "smiled shines shine shone smells smell sounds seems seem hate hates likes like liked "
        "pull throw push dig pick enjoy listen gather pile boil bake rub dry choose thread roll "
        "sweep wipe sing repeat sign write left send stays bring "
        "heard brush light paint water brings carried thanks begins "
        "remember rest try ask asked tried call called rests began begin start starts means "
        "think thought use used shared share danced sang laughed learned fits follow join"
    )
)
DANGLING = set(
    str.split("a an the and or but of to in on at by from with near under very my your so")
)
STOP_WORDS = DANGLING | set(str.split("up off had got could not no far is are was"))


def gold_scores(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """One gold score in [0, 1] per answer; `prompts` are the texts of the last user message.

    `rows`, the data rows the prompts came from, are accepted so that the signature fits any
    reward function; the gold score needs nothing from them.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses: one for each")
    return [gold(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def gold(prompt: str, response: str) -> float:
    """The total: `gold_parts` put together by the formula at the top of this file."""
    parts = gold_parts(prompt, response)
    if not any(parts.values()):
        return 0.0
    return math.prod(1 - WEIGHTS[part] * (1 - value) for part, value in parts.items())


def gold_parts(prompt: str, response: str) -> dict[str, float]:
    """The six parts, each in [0, 1]; every part of an empty answer is 0."""
    words, sentences = words_of(response), sentences_of(response)
    if not words:
        return dict.fromkeys(WEIGHTS, 0.0)
    complete = [is_complete(sentence) for sentence in sentences]
    return {
        "on_topic": on_topic(prompt, response),
        "sentences": sum(complete) / len(complete),
        "kind": kindness(words),
        "fresh": freshness(words),
        "length": max(0.0, min(1.0, len(words) / 12, (62 - len(words)) / 24)),
        "ending": float(complete[-1]),
    }


def words_of(text: str) -> list[str]:
    """Lower-case words, punctuation dropped."""
    return re.findall(r"[a-z']+", text.lower())


def sentences_of(text: str) -> list[str]:
    """Stretches of text up to and including their . ! or ?; the last may lack one."""
    return [piece.strip() for piece in re.findall(r"[^.!?]*[a-zA-Z][^.!?]*[.!?]*", text)]


def is_complete(sentence: str) -> bool:
    """Whether a sentence stands on its own, as the top of this file lists."""
    words = words_of(sentence)
    return (
        sentence[0].isupper()
        and sentence[-1] in ".!?"
        and 3 <= len(words) <= 22
        and any(word in VERBS for word in words)
        and all(a != b for a, b in itertools.pairwise(words))
        and words[-1] not in DANGLING
    )


def kindness(words: list[str]) -> float:
    """0.5 for neutral words; up with warm ones (two suffice), down with each unkind one."""
    warm = len(WARM & set(words))
    unkind = sum(word in UNKIND for word in words)
    return max(0.0, min(1.0, 0.5 + 0.25 * min(warm, 2) - 0.5 * unkind))


def freshness(words: list[str]) -> float:
    """1 when no run of three words comes twice; 0 when half of them have been said before."""
    runs = list(zip(words, words[1:], words[2:], strict=False))
    if not runs:
        return 0.0
    return max(0.0, 1 - 2 * (1 - len(set(runs)) / len(runs)))


def on_topic(prompt: str, response: str) -> float:
    """Share of the asked slots and of the kind's cue that the answer mentions."""
    said = set(words_of(response))
    kind, slots = parse_request(prompt)
    shares = [share_said(value, said) for value in slots.values()]
    if kind in CUES:
        shares.append(float(bool(CUES[kind] & said)))
    score = sum(shares) / len(shares) if shares else 0.0
    strangers = set(NAMES) & set(re.findall(r"\w+", response)) - set(re.findall(r"\w+", prompt))
    return score / 2 if strangers else score


def share_said(value: str, said: set[str]) -> float:
    """Share of a slot's content words among the words said."""
    asked = set(words_of(value)) - STOP_WORDS
    return len(asked & said) / len(asked) if asked else 1.0


def parse_request(prompt: str) -> tuple[str, dict[str, str]]:
    """(kind, slots) of a request; ("other", its text) for one this world did not write."""
    for kind, pattern in PATTERNS:
        if match := pattern.fullmatch(prompt.strip()):
            return kind, match.groupdict()
    return "other", {"text": prompt}


def _pattern(phrasing: str) -> re.Pattern:
    """A phrasing read backwards: {name} becomes a group of one word, {task} of several."""
    several = {"task", "trouble"}
    text = re.escape(phrasing).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(
        re.sub(
            r"\{(\w+)\}",
            lambda m: rf"(?P<{m[1]}>[\w ]+)" if m[1] in several else rf"(?P<{m[1]}>\w+)",
            text,
        )
    )


PATTERNS = [(kind, _pattern(text)) for kind, texts in PHRASINGS.items() for text in texts]
