"""What kimi-tiny learns: conversations made by rule, each with a key that decides whether it is for training or held out.

    decimals   which of two numbers is bigger (or smaller), English and Chinese
    images     one to three coloured shapes: colour, shape, place
    clips      a moving shape: what, which way, and the timestamp of the chunk in which it starts
    memory     numbers that are only in the reasoning of an earlier turn, English and Chinese
    tools      one call, or two where the second follows from the result of the first
    smalltalk  greetings

A sample is a list of messages as a user of the tokenizer would write them. The assistant always thinks first.
"""

import contextlib
import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .shapes import COLOURS, DIRECTIONS, PLACES, SHAPES, Shape, draw_clip, draw_scene, place_on_the_way

SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
HELD_OUT = 12  # one key in 12 is never trained on
# The model card's own.
NEVER_TRAINED = {
    "decimals 9.11 9.9",
    "decimals 9.9 9.11",
    "memory 473 921 235 215 222",
}


@dataclass
class Sample:
    """A conversation. `key` names what makes it different from others; media are not part of it."""

    task: str
    key: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    language: str = "en"
    facts: dict[str, Any] = field(default_factory=dict)


def is_held_out(key: str) -> bool:
    return key in NEVER_TRAINED or zlib.crc32(key.encode()) % HELD_OUT == 0


def draw_sample(task: str, rng: random.Random, held_out: bool = False, **options: Any) -> Sample:
    """A sample of a task whose key is, or is not, held out."""
    while True:
        sample = TASKS[task](rng, **options)
        if is_held_out(sample.key) == held_out:
            return sample


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(reasoning: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "reasoning_content": reasoning, "content": content, **more}


def with_system(messages: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    return [{"role": "system", "content": SYSTEM}, *messages] if rng.random() < 0.5 else messages


# ----------------------------------------------------------------------------------------------------------- decimals

QUESTIONS = {
    ("en", True): [
        "Which one is bigger, {a} or {b}? Think carefully.",
        "which one is bigger, {a} or {b}? think carefully.",
        "Which one is bigger, {a} or {b}?",
        "Which is larger: {a} or {b}?",
        "Which number is greater, {a} or {b}?",
        "What is bigger, {a} or {b}?",
        "Compare {a} and {b}. Which is bigger?",
        "{a} or {b}, which is the bigger number?",
    ],
    ("en", False): [
        "Which one is smaller, {a} or {b}?",
        "Which is less: {a} or {b}?",
        "Which number is smaller, {a} or {b}? Think carefully.",
    ],
    ("zh", True): [
        "{a} 和 {b} 哪个更大？",
        "{a} 和 {b} 哪个更大？请仔细想一想。",
        "哪个更大，{a} 还是 {b}？",
        "{a} 与 {b} 相比，哪个数大？",
        "请比较 {a} 和 {b}，哪个更大？",
    ],
    ("zh", False): ["{a} 和 {b} 哪个更小？", "哪个更小，{a} 还是 {b}？"],
}
DIGIT_NAMES = {
    "en": ["tens", "ones", "tenths", "hundredths", "thousandths"],
    "zh": ["十位", "个位", "十分位", "百分位", "千分位"],
}


def random_decimal(rng: random.Random, whole: int | None = None) -> str:
    whole = rng.choice([rng.randint(0, 9), rng.randint(0, 99)]) if whole is None else whole
    digits = rng.choice([0, 1, 1, 1, 2, 2, 2, 3])
    fraction = "".join(str(rng.randint(0, 9)) for _ in range(digits))
    return f"{whole}.{fraction}" if fraction else str(whole)


def compare_steps(a: str, b: str, language: str) -> tuple[list[str], int]:
    """The comparison place by place, and its result: 1 if a is bigger, -1 if b is, 0 if they are equal.

    Both digits are said before they are judged: what the model has not yet said it has to see through four layers.
    """
    chinese = language == "zh"
    (whole_a, _, frac_a), (whole_b, _, frac_b) = a.partition("."), b.partition(".")
    wholes, length = max(len(whole_a), len(whole_b)), max(len(frac_a), len(frac_b))
    digits_a = whole_a.rjust(wholes, "0") + frac_a.ljust(length, "0")
    digits_b = whole_b.rjust(wholes, "0") + frac_b.ljust(length, "0")
    places = zip(DIGIT_NAMES[language][2 - wholes :], map(int, digits_a), map(int, digits_b), strict=False)
    steps = []
    for name, left, right in places:
        sign = "=" if left == right else ">" if left > right else "<"
        steps.append(f"{name}：{left}、{right}，{sign}" if chinese else f"{name}: {left} and {right}, {sign}")
        if left != right:
            return steps, 1 if left > right else -1
    return steps, 0


def decimals(rng: random.Random, language: str | None = None, pair: tuple[str, str] | None = None) -> Sample:
    language = language or rng.choice(["en", "zh"])
    a = random_decimal(rng)
    same_whole = int(a.partition(".")[0]) if rng.random() < 0.7 else None
    b = random_decimal(rng, same_whole)
    if rng.random() < 0.15 and "." in a:  # differ late, or not at all
        b = a[:-1] + str(rng.randint(0, 9)) + rng.choice(["", "", "0", "5"])
    if len(b.partition(".")[2]) > 3:
        b = b[:-1]
    a, b = pair or (a, b)
    bigger = rng.random() < 0.85 or pair is not None
    question = rng.choice(QUESTIONS[language, bigger])
    steps, sign = compare_steps(a, b, language)
    answer = a if sign == (1 if bigger else -1) else b
    if language == "zh":
        word, which = "大" if bigger else "小", "第一个" if answer is a else "第二个"
        closing = f"{which}更{word}，所以 {answer} 更{word}。" if sign else "所以两个数相等。"
        thought = f"比较 {a} 和 {b}。" + "；".join(steps) + "。" + closing
        content = f"{answer} 更{word}。" if sign else f"{a} 和 {b} 一样大。"
    else:
        word, which = "bigger" if bigger else "smaller", "first" if answer is a else "second"
        closing = f"The {which} is {word}, so {answer} is {word}." if sign else "So they are equal."
        thought = f"I compare {a} and {b}: " + "; ".join(steps) + f". {closing}"
        content = f"{answer} is {word}." if sign else f"{a} and {b} are equal."
    messages = with_system([user(question.format(a=a, b=b)), assistant(thought, content)], rng)
    return Sample("decimals", f"decimals {a} {b}", messages, language=language, facts={"answer": content})


# ------------------------------------------------------------------------------------------------------------- images

NUMBER_WORDS = ["are no shapes", "is one shape", "are two shapes", "are three shapes"]
IMAGE_PROMPTS = [
    "Describe this image in detail.",
    "Describe the image.",
    "What do you see in this image?",
    "What is in this picture?",
]


def with_text(part: dict[str, Any], text: str, rng: random.Random) -> list[dict[str, Any]]:
    parts = [part, {"type": "text", "text": text}]
    return parts if rng.random() < 0.5 else parts[::-1]


def images(rng: random.Random) -> Sample:
    places = rng.sample(list(PLACES), rng.choice([1, 2, 2, 3, 3]))
    places.sort(key=list(PLACES).index)  # as one reads
    shapes = [Shape(rng.choice(list(COLOURS)), rng.choice(SHAPES), place) for place in places]
    image = draw_scene(shapes, rng)
    items = {shape.place: f"{i}. a {shape} {shape.place}" for i, shape in enumerate(shapes, 1)}
    seen = "; ".join(f"{place}: {items.get(place, 'none')}" for place in PLACES)
    there = f"There {NUMBER_WORDS[len(shapes)]}"
    thought = f"I look at each place. {seen}. {there}."
    content = f"{there}: {'; '.join(items.values())}."
    question = with_text({"type": "image", "image": image}, rng.choice(IMAGE_PROMPTS), rng)
    key = "images " + "; ".join(f"{shape} {shape.place}" for shape in shapes)
    return Sample(
        "images",
        key,
        with_system([user(question), assistant(thought, content)], rng),
        facts={"shapes": shapes},
    )


SEEN = re.compile(
    rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(sorted(PLACES, key=len, reverse=True))})"
)


def shapes_in(text: str) -> list[Shape]:
    """The shapes that a description names."""
    return [Shape(*match) for match in SEEN.findall(text)]


# -------------------------------------------------------------------------------------------------------------- clips

CLIP_PROMPTS = [
    "Describe the video in detail.",
    "Describe this video in detail.",
    "What happens in this video?",
    "What moves in this clip, which way, and when?",
]
CHUNK = 4  # frames of a chunk, sampled at 2 per second


def timestamp(seconds: float) -> str:
    whole, milliseconds = int(seconds), int((seconds % 1) * 1000)
    return f"00:{whole // 60:02d}:{whole % 60:02d}.{milliseconds:03d}"


def clips(rng: random.Random) -> Sample:
    """A clip of one to three chunks; the shape starts to move at the beginning of one of them."""
    num_chunks = rng.choice([1, 1, 2, 3])  # one alone has its direction only in the order of its frames
    num_frames = rng.randint(CHUNK * num_chunks - 1, CHUNK * num_chunks)  # given at the sampled rate
    fps = 2.0 if rng.random() < 0.5 else round(rng.uniform(1.2, 2.0), 2)
    shape = Shape(rng.choice(list(COLOURS)), rng.choice(SHAPES))
    direction = rng.choice(list(DIRECTIONS))
    chunk = rng.randrange(num_chunks)
    starts = CHUNK * chunk + rng.uniform(-0.4, 0.3)
    # In frames: the shape crosses the picture within the chunk,
    shortest = min(CHUNK, num_frames - CHUNK * chunk) - 1.4
    # or by the end of the next, so that each chunk sees it move.
    longest = max(min(num_frames - 1 - starts, 6.6), shortest)
    lasts = rng.uniform(shortest, shortest + 0.7) if rng.random() < 0.6 else rng.uniform(shortest, longest)
    frames = draw_clip(shape, direction, starts, lasts, num_frames, rng)
    when = timestamp(CHUNK * chunk / fps)
    seen = []
    for first in range(0, num_frames, CHUNK):
        ends = first, min(first + CHUNK, num_frames) - 1
        here, there = (place_on_the_way(direction, (frame - starts) / lasts) for frame in ends)
        verb = "rests" if here == there else "moves"
        seen.append(f"{timestamp(first / fps)}: {here}, {there}, {verb}")
    thought = f"I see a {shape}. {'; '.join(seen)}. So it starts to move at {when}, {direction}."
    content = f"A {shape} moves {direction}, starting at {when}."
    question = with_text({"type": "video", "video": frames, "fps": fps}, rng.choice(CLIP_PROMPTS), rng)
    key = f"clips {shape} {direction} {when} {num_frames} {fps}"
    facts = {"content": content, "shape": str(shape), "direction": direction, "when": when}
    return Sample("clips", key, with_system([user(question), assistant(thought, content)], rng), facts=facts)


# ------------------------------------------------------------------------------------------------------------- memory

EN_COUNTS = ["zero", "one", "two", "three", "four", "five", "six"]
ZH_COUNTS = "零一两三四五六"
FIRST_QUESTIONS = {
    "en": ["Tell me {k} random numbers.", "Give me {k} random numbers.", "Please name {k} random numbers."],
    "zh": ["告诉我{k}个随机数字。", "请说出{k}个随机数。", "给我{k}个随机数字。"],
}
FIRST_THOUGHTS = {
    "en": [
        "I'll start by listing {n} numbers: {all}, and I'll tell you the first {k}.",
        "I think of {n} numbers: {all}. I tell the first {k}.",
        "Let me list {n} numbers: {all}. The user wants {k}, so I say the first {k}.",
    ],
    "zh": ["我先想{n}个数：{all}，再说出前{k}个。", "我心里想{n}个数：{all}。用户要{k}个，我说前{k}个。"],
}
SECOND_QUESTIONS = {
    "en": [
        "What are the other {r} numbers you have in mind?",
        "What are the other {r} numbers that you have in mind?",
        "what are the other {r} you had in mind?",
        "Which other {r} numbers did you think of?",
        "And the other {r}?",
    ],
    "zh": ["你心里想的另外{r}个数字是什么？", "另外{r}个数字是什么？", "你还想了哪{r}个数？"],
}


def listed(numbers: list[int], language: str) -> str:
    return ("、" if language == "zh" else ", ").join(str(number) for number in numbers)


def memory(
    rng: random.Random,
    language: str | None = None,
    numbers: list[int] | None = None,
    keep_thoughts: bool | None = None,
) -> Sample:
    """Two turns; without the thoughts of the first (one sample in eight) the second says that it cannot know."""
    language = language or rng.choice(["en", "en", "zh"])
    keep = rng.random() < 0.875 if keep_thoughts is None else keep_thoughts
    if numbers is None:
        smallest = rng.choice([100, 100, 100, 10, 1000])
        numbers = rng.sample(range(smallest, 10 * smallest), rng.choice([5, 5, 5, 4, 6]))
    told = 3 if len(numbers) >= 5 else 2
    rest, counts = numbers[told:], EN_COUNTS if language == "en" else ZH_COUNTS
    words = {
        "n": counts[len(numbers)],
        "k": counts[told],
        "r": counts[len(rest)],
        "all": listed(numbers, language),
    }
    said, others = listed(numbers[:told], language), listed(rest, language)
    first = rng.choice(FIRST_THOUGHTS[language]).format(**words)
    if language == "zh":
        thought = f"我想的数是 {words['all']}。已经说了 {said}。所以另外{words['r']}个是 {others}。"
        content = f"另外{words['r']}个数字是 {others}。"
        forgot = "前面的思考不在了，只有说出的数，我无法知道。", "我不知道：我前面的思考不在了。"
    else:
        thought = f"I thought of {words['all']}. I told {said}. So the other {words['r']} are {others}."
        content = f"The other {words['r']} numbers are {others}."
        forgot = (
            "My earlier thoughts are not there, only what I said. I cannot know.",
            "I do not know: my thoughts are gone.",
        )
    messages = [
        user(rng.choice(FIRST_QUESTIONS[language]).format(**words)),
        assistant(first if keep else "", said),
    ]
    if rng.random() < 0.1:  # something else in between
        messages += [m for m in decimals(rng, language).messages if m["role"] != "system"]
    answer = assistant(thought, content) if keep else assistant(*forgot)
    messages += [user(rng.choice(SECOND_QUESTIONS[language]).format(**words)), answer]
    key = "memory " + " ".join(map(str, numbers))
    return Sample("memory", key, with_system(messages, rng), language=language, facts={"rest": rest})


# -------------------------------------------------------------------------------------------------------------- tools

# fmt: off
CITIES = ["Beijing", "Shanghai", "Paris", "Rome", "Berlin", "London", "Madrid", "Vienna", "Oslo", "Cairo", "Tokyo", "Osaka", "Seoul", "Delhi", "Mumbai", "Sydney", "Toronto", "Boston", "Chicago", "Dallas", "Denver", "Miami", "Lima", "Quito", "Bogota", "Havana", "Lagos", "Nairobi", "Tunis", "Athens", "Lisbon", "Dublin", "Zurich", "Geneva", "Prague", "Warsaw", "Budapest", "Helsinki", "Stockholm", "Copenhagen", "Moscow", "Kyiv", "Istanbul", "Ankara", "Dubai", "Hanoi", "Bangkok", "Jakarta", "Manila"]
PEOPLE = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Karl", "Laura", "Maria", "Noah", "Olga", "Paul", "Rosa", "Simon", "Tina", "Victor", "Wei", "Yan", "Zoe", "Li", "Ming", "Hana", "Kenji", "Omar", "Leila", "Ivan"]
# fmt: on
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy")
PLACE_PARAMETERS = ("city", "location", "place", "town")
# Enough names that the declared one has to be read.
VERBS = ("get", "find", "lookup", "query", "fetch", "show", "read", "check")
WEATHER_NOUNS, PERSON_NOUNS = ("weather", "forecast", "sky", "report"), ("person", "home", "address", "city")
OTHER_TOOLS = (
    ("get_time", "The local time of a city", "city"),
    ("convert_currency", "Converts an amount of money", "amount"),
    ("search", "Searches the web", "query"),
    ("send_mail", "Sends a mail", "address"),
)


def tool_name(nouns: tuple[str, ...], rng: random.Random) -> str:
    return f"{rng.choice(VERBS)}_{rng.choice(nouns)}"


def declare(name: str, description: str, parameter: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


class Conversation:
    """Messages with calls, ids counted over the whole of it."""

    def __init__(self, question: str, rng: random.Random):
        self.messages, self.calls = with_system([user(question)], rng), 0

    def call(self, thought: str, name: str, parameter: str, value: str, result: str) -> None:
        call_id, arguments = f"functions.{name}:{self.calls}", json.dumps({parameter: value})
        function = {"name": name, "arguments": arguments}
        calls = [{"id": call_id, "type": "function", "function": function}]
        thought = f"{thought} I call {name} with {parameter}."
        self.messages.append(assistant(thought, "", tool_calls=calls))
        self.messages.append({"role": "tool", "name": name, "tool_call_id": call_id, "content": result})
        self.calls += 1


def tools(rng: random.Random) -> Sample:
    """A question about the weather of a city, of two cities, or of where somebody lives."""
    weather, person = tool_name(WEATHER_NOUNS, rng), tool_name(PERSON_NOUNS, rng)
    place, who = rng.choice(PLACE_PARAMETERS), rng.choice(("name", "person"))
    one, two = rng.sample(CITIES, 2)
    name = rng.choice(PEOPLE)
    kind = rng.choice(["one", "two", "chain"])
    degrees = rng.sample(range(1, 40), 2)
    skies = rng.choice(SKIES), rng.choice(SKIES)
    results = [f"{degree} degrees, {sky}" for degree, sky in zip(degrees, skies, strict=True)]
    declared = [declare(weather, "The weather of a city", place)]
    if kind == "two":
        question = rng.choice(["Where is it warmer, in {} or in {}?", "Which city is warmer, {} or {}?"])
        chat = Conversation(question.format(one, two), rng)
        chat.call(f"I need the weather of {one} and of {two}. First {one}.", weather, place, one, results[0])
        chat.call(f"{one} has {degrees[0]} degrees. Now {two}.", weather, place, two, results[1])
        sign, which, winner = (">", "first", one) if degrees[0] > degrees[1] else ("<", "second", two)
        last = assistant(
            f"{one}: {degrees[0]}; {two}: {degrees[1]}. {degrees[0]} and {degrees[1]}, {sign}. The {which} is bigger,"
            f" so {winner} is warmer.",
            f"It is warmer in {winner}.",
        )
    else:
        subject = one
        if kind == "chain":
            question = rng.choice(
                ["What is the weather where {} lives?", "How is the weather at the home of {}?"]
            )
            chat = Conversation(question.format(name), rng)
            declared.append(declare(person, "The city in which a person lives", who))
            chat.call(
                f"First I have to find where {name} lives.", person, who, name, f"{name} lives in {one}."
            )
            thought = f"{name} lives in {one}. Now I need the weather of {one}."
        else:
            question = rng.choice(
                ["What is the weather in {}?", "How is the weather in {} today?", "Weather in {}?"]
            )
            chat = Conversation(question.format(one), rng)
            thought = f"I need the weather of {one}."
        chat.call(thought, weather, place, subject, results[0])
        last = assistant(
            f"{one} has {degrees[0]} degrees and it is {skies[0]}.",
            f"It is {skies[0]} in {one}, {degrees[0]} degrees.",
        )
    if len(declared) < 2 or rng.random() < 0.3:
        declared.append(declare(*rng.choice(OTHER_TOOLS)))
    rng.shuffle(declared)
    key = f"tools {kind} {one} {two if kind == 'two' else name if kind == 'chain' else ''} {weather}"
    return Sample("tools", key, [*chat.messages, last], declared, facts={"kind": kind})


# ---------------------------------------------------------------------------------------------------------- smalltalk

SMALLTALK = [
    ("Hello!", "The user greets me.", "Hello! How can I help you?"),
    ("Hi", "The user greets me.", "Hello! How can I help you?"),
    (
        "Who are you?",
        "The user asks who I am.",
        "I am a tiny Kimi. I compare numbers, see shapes and call tools.",
    ),
    ("What can you do?", "The user asks what I can do.", "I compare numbers, see shapes and call tools."),
    ("Thank you!", "The user thanks me.", "You are welcome!"),
    ("你好！", "用户向我问好。", "你好！我能帮你什么？"),
    ("你是谁？", "用户问我是谁。", "我是小小的 Kimi。我会比较数字、看图形、调用工具。"),
    ("谢谢！", "用户感谢我。", "不客气！"),
]


def smalltalk(rng: random.Random) -> Sample:
    question, thought, content = rng.choice(SMALLTALK)
    messages = with_system([user(question), assistant(thought, content)], rng)
    return Sample("smalltalk", f"smalltalk {question} trained", messages)


TASKS: dict[str, Callable[..., Sample]] = {
    "decimals": decimals,
    "images": images,
    "clips": clips,
    "memory": memory,
    "tools": tools,
    "smalltalk": smalltalk,
}
WEIGHTS = {"decimals": 7.0, "images": 4.0, "clips": 9.0, "memory": 2.5, "tools": 4.5, "smalltalk": 0.3}


# ----------------------------------------------------------------------------------------------------------- checking


def is_right(sample: Sample, answer: dict[str, Any], reference: dict[str, Any]) -> bool:
    """Whether a parsed completion is right where `reference` stood: its thoughts are its own, what it says and does counts."""
    content = (answer.get("content") or "").strip()
    if not (answer.get("reasoning_content") or "").strip():
        return False
    if reference.get("tool_calls"):
        return calls_of(answer) == calls_of(reference)
    if sample.task == "images":
        return shapes_in(content) == sample.facts["shapes"]
    if sample.task == "memory" and reference is sample.messages[-1] and reference["reasoning_content"]:
        return [int(number) for number in re.findall(r"\d+", content)] == sample.facts["rest"]
    return content == reference["content"] and not answer.get("tool_calls")


def calls_of(message: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """Id, name and arguments of each call; arguments that are no JSON stay text."""
    calls = []
    for call in message.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
        calls.append((call["id"], call["function"]["name"], arguments))
    return calls
