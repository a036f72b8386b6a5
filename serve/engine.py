"""One model for several clients: a bounded queue, one worker thread, and caches kept between turns.

    admit()     a place in the queue, or QueueFull: nothing of a request is read before it has one
    prepare()   messages -> ids, pixels and the keys of its tokens       (any thread)
    submit()    into the queue                                           (any thread)
    worker      generate(), one job at a time, with the cache of the longest common prefix
    job.emit    gets Events while tokens come, then a Completion or an exception (from the worker's thread)

A turn's prompt begins with the whole turn before it, because the template keeps all reasoning. `PrefixCaches` keeps
the latents of the last conversations; of a new prompt only what no cache holds is computed. Two tokens are the same
if their ids are, and a `<|media_pad|>` only if the picture behind it is, too: its key is made of the item's pixels.

Sampling is seeded for each job, with the global generator put back afterwards. There is one worker, so no other
thread uses the generator.
"""

import contextlib
import hashlib
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from kimi.kimi_cache import new_cache
from kimi.kimi_output import CALL_BEGIN, SECTION_BEGIN, THINK_END, Event, KimiCompletionStream
from kimi.kimi_tools import normalize_tools

log = logging.getLogger("kimi.serve")

GREEDY_BELOW = 1e-3  # temperature; dividing by less overflows
MIN_SHARED = 32  # tokens; less is computed sooner than copied
MAX_DROPPED = 64  # tokens that a cache may lose to a prompt that takes it over; else the prompt takes a copy
MAX_PIXEL_BYTES = 2 * 2**30  # float32 patches of one prompt
PIXEL_BYTES_PER_PATCH = 3 * 14 * 14 * 4


class QueueFull(Exception):
    """Every place is taken. `retry_after_s`: when one may be free, estimated from the time of earlier jobs."""

    def __init__(self, num_places: int, retry_after_s: int):
        super().__init__(f"all {num_places} places are taken; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class PromptTooLong(ValueError):
    """More tokens than the context has."""


@dataclass
class Sampling:
    """max_tokens: None for as many as fit. temperature 0 is greedy. seed: None for a new one each time. stop: texts
    that end the answer when they come in its content; they are not looked for in the reasoning."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass
class Prompt:
    """inputs: what the processor made, (1, T) ids and maybe pixels. keys: one per token, equal only for equal tokens
    that show equal pictures."""

    inputs: dict[str, Any]
    keys: list[int]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class Completion:
    """message: as `parse_completion` gives it. Counts are in tokens; `seconds` from the start of the prefill to the end,
    `first_s` to the first token."""

    message: dict[str, Any]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int
    seconds: float
    first_s: float
    ids: list[int]


@dataclass
class Job:
    """A prompt in the queue or being answered. `emit` is called from the worker's thread and must not block."""

    prompt: Prompt
    sampling: Sampling
    emit: Callable[[Event | Completion | Exception], None]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Ends it before its next token, or before its first if it still waits."""
        self.cancelled.set()


# --- caches of conversations ------------------------------------------------------------------------------------------


class PrefixCaches:
    """The latents of the last conversations, the least recently used forgotten first.

    max_caches: how many. max_tokens: how many tokens they may hold together. One thread uses it.
    """

    def __init__(self, config: Any, max_caches: int, max_tokens: int):
        self.config, self.max_caches, self.max_tokens = config, max_caches, max_tokens
        self._kept: list[tuple[list[int], Any]] = []  # oldest first

    def take(self, keys: list[int]) -> tuple[Any, int]:
        """A cache that holds the first n tokens of `keys`, at most all but the last, and n."""
        lengths = [shared_length(kept, keys[:-1]) for kept, _ in self._kept]
        shared = max(lengths, default=0)
        if shared < MIN_SHARED:
            return new_cache(self.config), 0
        # The youngest of those that share as much.
        index = max(i for i, length in enumerate(lengths) if length == shared)
        kept, cache = self._kept[index]
        if len(kept) - shared <= MAX_DROPPED:
            del self._kept[index]
            if len(kept) > shared:
                cache.crop(shared - len(kept))  # 5.x takes the number to remove only, below zero
        else:
            self._kept.append(self._kept.pop(index))
            cache = copy_of(cache, shared, self.config)
        return cache, shared

    def keep(self, keys: list[int], cache: Any) -> None:
        """Keeps a cache that holds exactly `keys`."""
        self._kept.append((keys, cache))
        while self._kept and (len(self._kept) > self.max_caches or self.num_tokens > self.max_tokens):
            del self._kept[0]

    @property
    def num_tokens(self) -> int:
        return sum(len(keys) for keys, _ in self._kept)

    def clear(self) -> None:
        self._kept.clear()


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading elements are equal."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # slices compare in C: a search by halves reads each element at most twice
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def copy_of(cache: Any, length: int, config: Any) -> Any:
    """A new cache with the first `length` tokens of `cache`."""
    copied = new_cache(config)
    for index, layer in enumerate(cache.layers):
        copied.update(layer.keys[:, :, :length], layer.values[:, :, :length], index)
    return copied


def token_keys(inputs: Mapping[str, Any], pad_id: int, merge: Sequence[int]) -> list[int]:
    """One integer per token: its id, or in a picture a negative number made of the picture and the position in it."""
    keys = inputs["input_ids"][0].tolist()
    if inputs.get("pixel_values") is None:
        return keys
    places = iter([index for index, key in enumerate(keys) if key == pad_id])
    start = 0
    for frames, rows, columns in inputs["grid_thws"].tolist():
        pixels = inputs["pixel_values"][start : start + frames * rows * columns]
        start += len(pixels)
        digest = hashlib.sha256(f"{frames} {rows} {columns} ".encode())
        digest.update(pixels.contiguous().numpy().tobytes())
        base = int.from_bytes(digest.digest()[:16], "big") << 24
        for offset in range(rows // merge[0] * (columns // merge[1])):
            keys[next(places)] = -1 - base - offset
    return keys


# --- one completion ---------------------------------------------------------------------------------------------------


class StopTexts:
    """Finds the first of some texts in content that comes in pieces, and holds back what may be the beginning of one."""

    def __init__(self, texts: Sequence[str]):
        self.texts = [text for text in texts if text]
        self.found = False
        self._held = ""

    def feed(self, text: str) -> str:
        """The part that certainly precedes all of the texts."""
        text = self._held + text
        starts = [start for start in map(text.find, self.texts) if start >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        held = max((overlap(text, stop) for stop in self.texts), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        rest, self._held = self._held, ""
        return "" if self.found else rest


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


class Receiver(BaseStreamer):
    """The streamer of `generate`: parses each token, emits events, and says when to stop."""

    def __init__(self, tokenizer: Any, job: Job):
        self.job = job
        self.ids: list[int] = []
        self.first_at: float | None = None  # time.perf_counter()
        self.stop = StopTexts(job.sampling.stop)
        self._content: list[str] = []  # as emitted, when a stop text cut it
        self._stream = KimiCompletionStream(tokenizer)
        self._prompt_seen = False
        self._ends = {tokenizer.special_tokens[name] for name in (THINK_END, SECTION_BEGIN, CALL_BEGIN)}
        self._stops = {tokenizer.special_tokens[name] for name in ("<|im_end|>", "[EOS]", "[EOT]")}

    def put(self, value: Any) -> None:
        if not self._prompt_seen:  # generate() hands over the prompt first
            self._prompt_seen = True
            return
        if self.first_at is None:
            self.first_at = time.perf_counter()
        ids = value.flatten().tolist()
        self.ids += ids
        self._emit(self._stream.feed_events(ids))

    def end(self) -> None:
        """Of `generate`; the completion is finished by `result`."""

    def _emit(self, events: list[Event]) -> None:
        for event in events:
            if self.stop.found:
                return
            if event.kind == "content" and self.stop.texts:
                text = self.stop.feed(event.text)
                event = event._replace(text=text)
                self._content.append(text)
            elif event.kind == "call_begin":  # no more content follows
                self._emit_held()
            if event.text or event.kind in ("call_begin", "call_end"):
                self.job.emit(event)

    def _emit_held(self) -> None:
        if held := self.stop.rest():
            self._content.append(held)
            self.job.emit(Event("content", held))

    def result(self) -> tuple[dict[str, Any], str]:
        """The message and the finish_reason."""
        self._emit(self._stream.finish_events())
        self._emit_held()
        message, reason = self._stream.result(), self._stream.finish_reason or "length"
        if self.stop.found:  # text of the same step after the stop text does not count
            message = {
                "role": "assistant",
                "reasoning_content": message["reasoning_content"],
                "status": "complete",
            }
            message["content"], reason = "".join(self._content), "stop"
        return message, reason

    @property
    def reasoning_tokens(self) -> int:
        """Tokens in front of the one that ended the reasoning."""
        ends = self._ends | self._stops
        return next((index for index, token in enumerate(self.ids) if token in ends), len(self.ids))


class Halt(StoppingCriteria):
    """Ends `generate` when the client is gone, the engine is closed or a stop text was found."""

    def __init__(self, receiver: Receiver, engine_closed: threading.Event):
        self.receiver, self.closed = receiver, engine_closed

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        halt = self.receiver.stop.found or self.receiver.job.cancelled.is_set() or self.closed.is_set()
        return torch.full((len(input_ids),), halt, dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators, and puts their state back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((secrets.randbits(63) if seed is None else seed) % 2**63)
        yield


# --- the engine -------------------------------------------------------------------------------------------------------


class Engine:
    """The model behind a queue.

    max_waiting: jobs that may wait while one runs. max_context: tokens of prompt and answer, by default what the model
    has. default_max_tokens: of an answer whose job names no number. max_caches, max_cached_tokens: see PrefixCaches; 0
    caches keep nothing.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_waiting: int = 64,
        max_context: int | None = None,
        default_max_tokens: int = 32768,
        max_caches: int = 8,
        max_cached_tokens: int = 262144,
    ):
        text = model.config.text_config
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        limit = text.max_position_embeddings
        self.max_context = min(max_context or limit, limit)
        self.default_max_tokens = default_max_tokens
        self.num_places = max_waiting + 1
        self.caches = PrefixCaches(text, max_caches, max_cached_tokens)
        self.closed = threading.Event()
        self._places = threading.BoundedSemaphore(self.num_places)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._num_admitted = 0
        self._count_lock = threading.Lock()
        self._mean_s = 1.0  # of a job, the last ones counting most
        self._worker = threading.Thread(target=self._work, name="kimi-engine", daemon=True)
        self._worker.start()

    # Places

    def admit(self) -> None:
        """Takes a place, which `leave` gives back. Raises QueueFull, at once, where there is none."""
        if not self._places.acquire(blocking=False):
            wait_s = self._mean_s * self.num_places / 2
            raise QueueFull(self.num_places, round(min(max(wait_s, 1), 60)))
        with self._count_lock:
            self._num_admitted += 1

    def leave(self) -> None:
        with self._count_lock:
            self._num_admitted -= 1
        self._places.release()

    @property
    def num_admitted(self) -> int:
        """Requests that hold a place: read, waiting, running or being answered."""
        return self._num_admitted

    # Prompts

    def prepare(self, messages: Sequence[Any], tools: Any = None, **options: Any) -> Prompt:
        """Ids and pixels of a conversation, whose media are whatever the processor takes.

        Raises ValueError or OSError, as the processor does, and PromptTooLong before any pixels are computed.
        """
        return self.prepare_checked(messages, normalize_tools(tools), **options)

    def prepare_checked(
        self, messages: Sequence[Any], tools: Any, renumber_calls: bool = False, **options: Any
    ) -> Prompt:
        """As `prepare`, from tools that `normalize_tools` returned. renumber_calls: see `KimiK25Processor.prepare_chat`."""
        chat = self.processor.prepare_chat(messages, tools, renumber_calls=renumber_calls)
        self._check_media(chat.items)
        template = {"return_dict": True, "return_tensors": "pt", **options}
        inputs = dict(self.processor.apply_chat_template(chat, **template))
        self._check_length(inputs["input_ids"].shape[1])
        config = self.model.config
        merge = config.vision_config.merge_kernel_size
        return Prompt(inputs, token_keys(inputs, config.media_placeholder_token_id, merge))

    def _check_media(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Counts the tokens and bytes of media from their sizes alone: a long video does not fit into memory."""
        merge = self.model.config.vision_config.merge_kernel_size
        tokens = [self.processor.image_processor.media_tokens_calculator(item) for item in items]
        frames = [len(item["video_chunk"]) if item["type"] == "video_chunk" else 1 for item in items]
        patches = sum(count * merge[0] * merge[1] * n for count, n in zip(tokens, frames, strict=True))
        self._check_length(sum(tokens), "the media alone take")
        if patches * PIXEL_BYTES_PER_PATCH > MAX_PIXEL_BYTES:
            raise PromptTooLong(
                f"the media take {patches * PIXEL_BYTES_PER_PATCH} bytes of pixels, and the limit is {MAX_PIXEL_BYTES};"
                " give fewer or smaller ones"
            )

    def _check_length(self, num_tokens: int, what: str = "the messages take") -> None:
        if num_tokens >= self.max_context:
            raise PromptTooLong(
                f"{what} {num_tokens} tokens, and the context of this model has {self.max_context} for prompt and"
                " answer together; shorten the messages"
            )

    def answer_length(self, prompt: Prompt, max_tokens: int | None) -> int:
        """Tokens that the answer may have. Raises PromptTooLong if more are asked for than fit."""
        room = self.max_context - len(prompt)
        if max_tokens is None:
            return min(room, self.default_max_tokens)
        if max_tokens > room:
            raise PromptTooLong(
                f"the context of this model has {self.max_context} tokens, and {len(prompt) + max_tokens} are asked for:"
                f" {len(prompt)} in the messages and {max_tokens} for the answer; shorten one of them"
            )
        return max_tokens

    # Jobs

    def submit(self, job: Job) -> Job:
        self._jobs.put(job)
        return job

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[Event | Completion, None, None]:
        """Events, then the Completion, for callers in this process. Raises what the job raised."""
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        job = self.submit(Job(prompt, sampling, inbox.put))
        try:
            while True:
                item = inbox.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Completion):
                    return
        finally:
            job.cancel()

    def close(self) -> None:
        """Ends the running job and the waiting ones; returns when the worker has ended."""
        self.closed.set()
        self._jobs.put(None)
        self._worker.join(timeout=60)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self.closed.is_set():
                job.emit(RuntimeError("the server is shutting down"))
                continue
            if job.cancelled.is_set():
                continue
            try:
                completion = self._run(job)
            except Exception as error:  # one failed job must not stop the next
                log.exception("a job failed")
                self.caches.clear()  # their memory may be what was lacking
                job.emit(error)
            else:
                self._mean_s += (completion.seconds - self._mean_s) / 8
                job.emit(completion)

    def _run(self, job: Job) -> Completion:
        prompt, start = job.prompt, time.perf_counter()
        cache, num_cached = self.caches.take(prompt.keys)
        receiver = Receiver(self.tokenizer, job)
        device = self.model.device
        inputs = {name: value.to(device) for name, value in prompt.inputs.items() if hasattr(value, "to")}
        with seeded(job.sampling.seed, device):
            self.model.generate(
                **inputs,
                **self._settings(job),
                past_key_values=cache,
                streamer=receiver,
                stopping_criteria=StoppingCriteriaList([Halt(receiver, self.closed)]),
            )
        self.caches.keep((prompt.keys + receiver.ids)[: cache.get_seq_length()], cache)
        message, reason = receiver.result()
        end = time.perf_counter()
        return Completion(
            message=message,
            finish_reason=reason,
            prompt_tokens=len(prompt),
            completion_tokens=len(receiver.ids),
            reasoning_tokens=receiver.reasoning_tokens,
            cached_tokens=num_cached,
            seconds=end - start,
            first_s=(receiver.first_at or end) - start,
            ids=receiver.ids,
        )

    def _settings(self, job: Job) -> dict[str, Any]:
        """Keywords of `generate`; what is not given stays as generation_config.json has it."""
        sampling = job.sampling
        settings: dict[str, Any] = {"max_new_tokens": self.answer_length(job.prompt, sampling.max_tokens)}
        if sampling.temperature is not None and sampling.temperature < GREEDY_BELOW:
            # None for the rest keeps transformers from warning about settings that greedy decoding does not use.
            return settings | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        settings |= {"do_sample": True, "top_k": 0}  # transformers' own default of 50 is not the model's
        given = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        return settings | {name: value for name, value in given.items() if value is not None}


def load(folder: str | Path) -> tuple[Any, Any]:
    """The model of a checkpoint and its processor, as a user loads them."""
    from transformers import AutoModelForCausalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="auto")
    return model.eval(), processor
