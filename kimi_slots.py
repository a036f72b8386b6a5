"""Slots that hold the busiest experts, and the files the others are read from. Knows tensors and files, no module.

    ExpertFiles   byte ranges of the shards, read into memory that is already there (a mapped file would count in the
                  resident set, by as much as the system chooses to keep)
    SlotCache     S slots on one device; a slot holds one expert of any layer. Slots of a projection are one
                  (S, N, M/8) tensor, so the products of `kimi_experts.py` multiply with them as they are
    CopyStream    how bytes get into the slots of a GPU: beside the products, and in order with them
    Visit         one pass of a layer over the experts that its router chose: reads run ahead in threads while
                  experts that are in memory compute

A SlotCache reads from ExpertFiles, or from another SlotCache: slots of an accelerator are filled from slots in RAM.

On a GPU the threads here are ahead of what it does, so each of these has its event (a point in a stream of the GPU):

    a slot is overwritten        after the products that were launched when it was claimed, on any stream
    products use a slot          after the copies into it
    a slot in RAM is overwritten after the copies out of it; so is the memory between a file and a GPU

The first two are waits of the GPU, the third of a reader thread. The thread that computes waits for none of them.

Which expert goes when a slot is needed: the one of least worth, where each use adds one and worth halves every
`half_life` tokens (LRFU, Lee et al., IEEE Transactions on Computers 50(12), 2001: it is LRU for a short half-life and
LFU for a long one). All decay alike, so log2(worth) + age needs no update until the next use.
"""

import functools
import heapq
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Any, Protocol, cast

import torch

from .kimi_files import Range, Shard, bytes_of, empty_for_weights, empty_page_locked, landing
from .kimi_safetensors import Source

Key = tuple[int, int]  # layer, expert
Event = Any  # torch.cuda.Event
# Puts data, the second of each pair, into tensors of a slot; if it is not there on return, the event says when it is.
Put = Callable[[Sequence[tuple[torch.Tensor, torch.Tensor]]], Event | None]
ALIGNMENT = 64  # bytes between tensors in the memory before a GPU; no dtype needs more
READERS = 4  # threads that read; see docs/history.md


# ------------------------------------------------------------------------------------------------------------- files


@dataclass
class Part:
    """One tensor of one expert on disk, and what the slots call it."""

    parameter: str
    source: Source
    name: str


class Staging(threading.local):
    """Page-locked memory of each reader thread, between the files and a GPU."""

    memory: torch.Tensor | None = None
    copied: Event | None = None  # when the last copy out of it is done

    def take(self, sizes: Sequence[int], device: torch.device) -> list[torch.Tensor]:
        """Bytes in these sizes, all of them anew with each call."""
        ends = list(accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        if self.memory is None or self.memory.nbytes < ends[-1]:
            self.memory = empty_page_locked((ends[-1],), torch.uint8, device)
        begins = [0, *ends[:-1]]
        return [self.memory[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]


@dataclass
class ExpertFiles:
    """The experts of a checkpoint by (layer, expert), as byte ranges of its files; counts what is read.

    `shapes` are (N, M) by projection, which `weight_shape` must repeat.
    """

    parts: dict[Key, dict[str, list[Part]]]  # by projection
    shapes: dict[str, tuple[int, int]]
    bytes_read: int = 0
    seconds: float = 0.0  # of all reading threads together
    shards: dict[str, Shard] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    staging: Staging = field(default_factory=Staging)

    def __post_init__(self) -> None:
        for projections in self.parts.values():
            for part in (part for parts in projections.values() for part in parts):
                if part.source.file not in self.shards:
                    self.shards[part.source.file] = Shard(part.source.file, part.source.stamp)

    def tasks(self, key: Key, out: dict[str, torch.Tensor], put: Put) -> list[Callable[[], Event | None]]:
        """What fills the tensors of a slot: one call for each projection, for threads of their own."""
        return [functools.partial(self._read, key, parts, out, put) for parts in self.parts[key].values()]

    def _read(self, key: Key, parts: list[Part], out: dict[str, torch.Tensor], put: Put) -> Event | None:
        start = time.perf_counter()
        parts = sorted(parts, key=lambda part: part.source.begin)
        places = [out.get(part.parameter) for part in parts]
        buffers = self._landings(parts, places)
        ranges: dict[str, list[Range]] = defaultdict(list)  # by file
        for part, buffer in zip(parts, buffers, strict=True):
            ranges[part.source.file].append(Range(part.source.begin, bytes_of(buffer), part.name))
        try:
            for file, of_file in ranges.items():
                self.shards[file].read(of_file)
        except OSError as error:
            raise OSError(f"expert {key[1]} of layer {key[0]}: {error}") from error
        elsewhere = []
        for part, place, buffer in zip(parts, places, buffers, strict=True):
            if place is None:
                expected = self.shapes[part.name.split(".")[-2]]
                check_matrix_shape(part.name, buffer.tolist(), expected)
            elif place is not buffer:
                elsewhere.append((place, buffer))
        copied = put(elsewhere) if elsewhere else None
        self.staging.copied = copied
        with self.lock:
            self.bytes_read += sum(buffer.nbytes for buffer in buffers)
            self.seconds += time.perf_counter() - start
        return copied

    def _landings(self, parts: Sequence[Part], places: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Where the bytes of each part are read to: its place if it can be, else memory from which they are put there."""
        gpus = {place.device for place in places if place is not None and place.is_cuda}
        if not gpus:
            pairs = zip(parts, places, strict=True)
            return [landing(place, part.source.shape, part.source.dtype) for part, place in pairs]
        sources = [part.source for part in parts]
        pieces = self.staging.take([source.end - source.begin for source in sources], gpus.pop())
        return [
            piece.view(source.dtype).view(source.shape) for piece, source in zip(pieces, sources, strict=True)
        ]


def check_matrix_shape(name: str, found: list[int], expected: tuple[int, int]) -> None:
    """`weight_shape` of an expert must say what the packed words' own shape says. Raises ValueError."""
    if found != list(expected):
        raise ValueError(
            f"{name} of the checkpoint says {found}, but the config makes the matrix {list(expected)}."
        )


# ------------------------------------------------------------------------------------------------------------- slots


class ReadsExperts(Protocol):
    """What a SlotCache is filled from: calls for its threads that read an expert into the tensors of a slot."""

    def tasks(self, key: Key, out: dict[str, torch.Tensor], put: Put) -> list[Callable[[], Event | None]]: ...


class CopyStream:
    """Copies into the slots of one GPU, on a stream of their own beside the products that use other slots."""

    def __init__(self, device: torch.device, stacks: Iterable[torch.Tensor]):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.uses: dict[Any, Event] = {}  # by stream: after the last products there that took slots
        for stack in stacks:
            stack.record_stream(self.stream)  # when freed, it is not given out before the copies are done

    def note_use(self) -> None:
        """To be called after products with slots were given to this thread's stream."""
        stream = torch.cuda.current_stream(self.device)
        self.uses = {other: event for other, event in self.uses.items() if not event.query()}
        self.uses[stream] = stream.record_event()

    def last_uses(self) -> list[Event]:
        """What a copy into a slot that is claimed now must wait for."""
        self.note_use()
        return list(self.uses.values())

    def put(self, after: Sequence[Event], pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Event:
        """A `Put` once `after` is given. Threads may take turns on the stream: then they wait for each other's, too."""
        with torch.cuda.stream(self.stream):
            for event in after:
                self.stream.wait_event(event)
            try:
                for place, data in pairs:
                    place.copy_(data, non_blocking=True)
            except BaseException:
                self.stream.synchronize()  # nobody gets an event, and what was copied from may be overwritten
                raise
            copied = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps
            copied.record(self.stream)
        return copied

    def arrive(self, copied: Iterable[Event]) -> None:
        """What this thread gives to its stream from now on comes after these copies."""
        stream = torch.cuda.current_stream(self.device)
        for event in copied:
            stream.wait_event(event)


def put_at_once(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for place, data in pairs:
        place.copy_(data)


def run_after(events: Sequence[Event], task: Callable[[], Event | None]) -> Event | None:
    for event in events:
        event.synchronize()
    return task()


def under_way(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if not event.query()]


@dataclass(eq=False)
class Entry:
    """One expert in a slot. It is there when all `reads` are done, and for a GPU when it has passed `arriving`."""

    slot: int
    reads: list[Future] = field(default_factory=list)
    arriving: list[Event] = field(default_factory=list)  # copies into the slot
    leaving: list[Event] = field(default_factory=list)  # copies out of it
    pins: int = 0

    def is_done(self) -> bool:
        return all(read.done() for read in self.reads)

    def has_failed(self) -> bool:
        return any(read.done() and read.exception() is not None for read in self.reads)


class Worth:
    """Recency and frequency in one number per expert: log2 of its uses, each halved every `half_life` tokens."""

    def __init__(self, half_life: float, num_layers: int):
        self.half_life, self.num_layers = half_life, num_layers
        self.now = 0.0  # in half-lives
        self.log2: dict[Key, float] = {}

    def use(self, keys: Iterable[Key]) -> None:
        """One pass of one layer."""
        self.now += 1 / (self.half_life * self.num_layers)
        for key in keys:
            self.log2[key] = self._sum(self.log2.get(key, -math.inf), self.now)

    def expect(self, key: Key, share: float) -> None:
        """As if `share` of all tokens had used the expert until now."""
        if share:
            self.log2[key] = self._sum(
                self.log2.get(key, -math.inf), self.now + math.log2(share * self.half_life / math.log(2))
            )

    @staticmethod
    def _sum(a: float, b: float) -> float:
        high, low = max(a, b), min(a, b)
        return high + math.log2(1 + 2 ** max(low - high, -1074.0))


class SlotCache:
    """`capacity` experts on `device`, those of most worth.

    `layout` gives shape and dtype of one expert's tensors by parameter name; `stacks` holds them as (capacity, ...).
    `copied_to` is a GPU whose slots are filled from these: they are then page-locked. Every method may be called from any
    thread.
    """

    def __init__(
        self,
        source: ReadsExperts,
        capacity: int,
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]],
        worth: Worth,
        device: torch.device | str = "cpu",
        readers: int = READERS,
        copied_to: torch.device | None = None,
    ):
        self.source, self.capacity, self.worth = source, capacity, worth
        self.stacks = {
            name: empty_for_weights((capacity, *shape), dtype, device)
            if copied_to is None
            else empty_page_locked((capacity, *shape), dtype, copied_to)
            for name, (shape, dtype) in layout.items()
        }
        self.device = next(iter(self.stacks.values())).device  # cuda:0 where "cuda" was given
        self.entry_bytes = sum(stack[0].nbytes for stack in self.stacks.values())
        self.entries: dict[Key, Entry] = {}
        self.free = list(reversed(range(capacity)))
        self.leaving: dict[int, list[Event]] = {}  # copies out of slots whose expert went
        self.ranking: list[tuple[float, int, Key, Entry]] = []  # a heap; worth as it was when pushed
        self.tiebreak = count()
        self.copies: CopyStream | None = None
        on_device: dict[str, Any] = {}
        if self.device.type == "cuda":
            self.copies = CopyStream(self.device, self.stacks.values())
            on_device = {"initializer": torch.cuda.set_device, "initargs": (self.device,)}
        self.threads = ThreadPoolExecutor(readers, "expert-reader", **on_device)
        self.lock = threading.RLock()
        self.asked = self.misses = 0

    def claim(
        self, key: Key, keep: Iterable[Key] = (), spare: Iterable[Key] | None = None, pin: bool = False
    ) -> Entry | None:
        """The expert's entry, whose reading starts now if it was not there. None if no slot can be had.

        Experts of `keep` stay. If no other can go, the first of `spare` that is here goes.
        """
        with self.lock:
            entry = self.entries.get(key)
            if entry is not None and entry.has_failed():  # try again
                self._drop(key, entry)
                entry = None
            if entry is None:
                slot = self._find_slot(keep, spare)
                if slot is None:
                    return None
                self.misses += 1
                self.entries[key] = entry = Entry(slot)
                heapq.heappush(self.ranking, (self._rank(key), next(self.tiebreak), key, entry))
                try:
                    entry.reads = self._start_reading(key, slot)
                except BaseException:  # an entry without reads would pass for one that is there
                    del self.entries[key]
                    self.free.append(slot)
                    raise
            entry.pins += pin
            return entry

    def _start_reading(self, key: Key, slot: int) -> list[Future]:
        out = {name: stack[slot] for name, stack in self.stacks.items()}
        after, put = self.leaving.get(slot, []), cast(Put, put_at_once)
        if self.copies is not None:
            after, put = [], functools.partial(self.copies.put, [*after, *self.copies.last_uses()])
        tasks = self.source.tasks(key, out, put)
        return [self.threads.submit(run_after, after, task) for task in tasks]

    def await_entry(self, key: Key, entry: Entry | None) -> int:
        """The slot, once the expert is in it; on a GPU, once what this thread gives to its stream next finds it there.

        Raises what a read raised; then the slot is free and the next try reads again. Raises RuntimeError if `claim` found
        no slot."""
        if entry is None:
            raise RuntimeError(f"all {self.capacity} slots of {self.device} are in use at once.")
        reads = entry.reads
        try:
            copied = [read.result() for read in reads]
        except BaseException:
            with self.lock:
                if self.entries.get(key) is entry:
                    self._drop(key, entry)
            raise
        with self.lock:
            if entry.reads is reads:  # no other thread was here before
                entry.arriving += [event for event in copied if event is not None]
                entry.reads = []
            if self.copies is not None:
                self.copies.arrive(entry.arriving)
                # Threads with streams of their own wait again.
                entry.arriving = under_way(entry.arriving)
        return entry.slot

    def note_use(self) -> None:
        """To be called after products with slots, by the thread that launched them."""
        if self.copies is not None:
            with self.lock:
                self.copies.note_use()

    def tasks(self, key: Key, out: dict[str, torch.Tensor], put: Put) -> list[Callable[[], Event | None]]:
        """As the source of a cache on another device."""
        return [functools.partial(self._copy, key, out, put)]

    def _copy(self, key: Key, out: dict[str, torch.Tensor], put: Put) -> Event | None:
        with self.lock:
            self.asked += 1
            self.worth.use([key])
            entry = self.claim(key, pin=True)
        copied = None
        try:
            slot = self.await_entry(key, entry)
            copied = put([(tensor, self.stacks[name][slot]) for name, tensor in out.items()])
        finally:
            if entry is not None:
                with self.lock:
                    entry.pins -= 1
                    if copied is not None:
                        entry.leaving = [*under_way(entry.leaving), copied]
        return copied

    def _find_slot(self, keep: Iterable[Key], spare: Iterable[Key] | None) -> int | None:
        if not self.free:
            victim = self._least_worth(keep)
            if victim is None and spare is not None:
                victim = next(
                    (key for key in spare if key in self.entries and not self.entries[key].pins), None
                )
            if victim is None:
                return None
            self._drop(victim, self.entries[victim])
        return self.free.pop()

    def _least_worth(self, keep: Iterable[Key]) -> Key | None:
        """One that is neither kept nor pinned, and not being read unless all others are."""
        passed, victim, being_read = [], None, None
        while self.ranking and victim is None:
            rank, tie, key, entry = heapq.heappop(self.ranking)
            if self.entries.get(key) is not entry:  # gone
                continue
            if rank < self._rank(key):  # used since
                heapq.heappush(self.ranking, (self._rank(key), tie, key, entry))
                continue
            passed.append((rank, tie, key, entry))
            if not entry.pins and key not in keep:
                if entry.is_done():
                    victim = key
                elif being_read is None:
                    being_read = key
        for item in passed:
            heapq.heappush(self.ranking, item)
        return victim if victim is not None else being_read

    def _rank(self, key: Key) -> float:
        return self.worth.log2.get(key, -math.inf)

    def _drop(self, key: Key, entry: Entry) -> None:
        wait(entry.reads)  # a thread may still write into the slot
        del self.entries[key]
        self.leaving[entry.slot] = entry.leaving
        self.free.append(entry.slot)

    def num_cached(self) -> int:
        with self.lock:
            return sum(entry.is_done() and not entry.has_failed() for entry in self.entries.values())

    def __deepcopy__(self, memo: dict) -> "SlotCache":
        return self  # a copy of a model reads the same experts


class Visit:
    """One pass of a layer over `experts`, ascending ids. Only the thread that made it may use it."""

    def __init__(self, cache: SlotCache, layer: int, experts: Sequence[int], num_experts: int):
        self.cache, self.layer, self.experts, self.num_experts = cache, layer, experts, num_experts
        self.place = {expert: place for place, expert in enumerate(experts)}
        self.passed = self.ahead = 0  # places: experts already used; experts whose reading was started
        self.remaining = {(layer, expert) for expert in experts}

    def read_ahead(self) -> None:
        """Starts reading what comes next, as far as slots are free or hold what this pass does not need."""
        while self.ahead < len(self.experts):
            if self.cache.claim((self.layer, self.experts[self.ahead]), self.remaining) is None:
                return
            self.ahead += 1

    def slot(self, expert: int) -> int:
        """Where the expert is, once it is there; valid until a later one is asked for."""
        for passed in self.experts[self.passed : self.place[expert]]:
            self.remaining.discard((self.layer, passed))
        self.passed = self.place[expert]
        key = self.layer, expert
        farthest = ((self.layer, other) for other in reversed(self.experts[self.passed + 1 :]))
        entry = self.cache.claim(key, self.remaining, farthest)
        self.read_ahead()
        return self.cache.await_entry(key, entry)

    def hold(self, experts: Iterable[int]) -> torch.Tensor:
        """(E,) int64 slots by expert id, on the device, of these experts, all there at once; they must be no more than the
        slots."""
        keys = {(self.layer, expert) for expert in experts}
        entries = {key: self.cache.claim(key, keys) for key in sorted(keys)}
        slots = torch.full((self.num_experts,), -1, dtype=torch.int64)
        for (_, expert), entry in entries.items():
            slots[expert] = self.cache.await_entry((self.layer, expert), entry)
        return upload(slots, self.cache.device)

    def row_groups(self, topk_ids: torch.Tensor) -> Iterator[tuple[slice, set[int]]]:
        """Cuts rows of ids (R, K), in RAM, so that the experts of a group fit the slots."""
        start = 0
        group: set[int] = set()
        for row, chosen in enumerate(topk_ids.tolist()):
            if len(group) + len(set(chosen) - group) > self.cache.capacity:
                yield slice(start, row), group
                start, group = row, set()
            group.update(chosen)
        yield slice(start, len(topk_ids)), group


def upload(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A few numbers to a device. From memory that is not page-locked a copy to a GPU would wait for it."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)
