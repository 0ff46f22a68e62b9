"""A serving engine in miniature: what its scheduler and block manager do to a paged cache, without a model.

Requests come and go at random; prompts share prefixes, chunks fill a token budget beside decode and speculative rows,
full pages are found again by the hash of their prefix (in the very step that fills them, too), and a pool that is too
small preempts requests and evicts pages, which others then fill. Keys, values and queries are functions of the tokens
up to their position alone, as in a model, so that a shared page holds what every one of its owners would have written.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from compactattn import PagedKV, PrefillBatch
from tests.strategies import Geometry, Step, ceil_div

TOPIC = 64  # tokens whose keys share a direction, and whose queries do
ODD = 0x9E3779B97F4A7C15
WORD = (1 << 64) - 1
#: settings of a plugin that leaves something out of such steps
FLASH = {
    "alpha": 0.4,
    "sink_blocks": 1,
    "window_blocks": 1,
    "block_size": 64,
    "query_block": 64,
    "dense_keys": 96,
    "dense_last_blocks": 0,
}


@dataclass
class Request:
    """tokens: prompt and output so far; hashes[p] is of tokens[: p + 1]; computed of them are in the cache."""

    tokens: list[int]
    output: int
    hashes: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    drafts: list[int] = field(default_factory=list)

    def known(self) -> list[int]:
        """Hashes of all tokens, drafts included."""
        tokens = self.tokens + self.drafts
        for p in range(len(self.hashes), len(tokens)):
            before = self.hashes[p - 1] if p else 1
            self.hashes.append((before * 6364136223846793005 + tokens[p] * ODD + 1442695040888963407) & WORD)
        return self.hashes


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's worth of lengths: what an engine hands to an attention backend.

    slots: int64 [T], page * page_size + place of each token. page_table: int32 [B, pages], stale entries beyond a
    request's own pages.
    """

    requests: list[Request]
    q_lens: list[int]
    seq_lens: list[int]
    page_table: Tensor
    slots: Tensor


class Scheduler:
    """Which requests run next, with how many tokens, on which pages."""

    def __init__(
        self,
        seed: int,
        *,
        pages: int,
        page_size: int,
        budget: int,
        max_requests: int,
        longest: int,
        drafts: int = 0,
    ) -> None:
        self.random = random.Random(seed)
        self.page_size, self.budget, self.max_requests, self.drafts = page_size, budget, max_requests, drafts
        self.width = ceil_div(longest, page_size)
        self.free: OrderedDict[int, None] = OrderedDict((page, None) for page in range(1, pages))
        self.users: Counter[int] = Counter()
        self.page_of: dict[int, int] = {}  # prefix hash to page
        self.hash_of: dict[int, int] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.seen: Counter[str] = Counter()  # what has happened, so that a test can ask for it
        self.fresh: set[int] = set()  # pages that this step fills
        self.table = torch.full((max_requests, self.width), -7, dtype=torch.int32)

    def add(self, tokens: list[int], output: int) -> None:
        self.waiting.append(Request(tokens, output))

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> Batch:
        """The next step; its pages are allotted, and those that it fills can be found by others at once."""
        budget, self.fresh, preempted = self.budget, set(), self.seen["requests preempted"]
        chosen: list[tuple[Request, int]] = []
        for request in list(self.running):
            if request not in self.running:
                continue  # preempted by one before it
            decodes = request.computed == len(request.tokens) - 1
            if decodes and self.drafts:
                drafts = self.random.randint(0, min(self.drafts, max(0, budget - 1)))
                request.drafts = [self.random.randrange(9) for _ in range(drafts)]
            count = min(len(request.tokens) + len(request.drafts) - request.computed, budget)
            if count and self._grow(request, request.computed + count):
                chosen.append((request, count))
                budget -= count
                self._publish(request, request.computed + count)
        while self.waiting and budget and len(self.running) < self.max_requests:
            if self.seen["requests preempted"] > preempted:
                break
            request = self.waiting[0]
            self._find_prefix(request)
            count = min(len(request.tokens) - request.computed, budget)
            if not self._grow(request, request.computed + count, preempt=False):
                self._release(request)
                break
            self.running.append(self.waiting.pop(0))
            chosen.append((request, count))
            budget -= count
            self._publish(request, request.computed + count)
        chosen.sort(key=lambda pair: (pair[1] > 1 + self.drafts, pair[1]))
        return self._batch(chosen)

    def commit(self, batch: Batch) -> None:
        """After the step: the cache holds its tokens; the model speaks, drafts are accepted or not, requests end."""
        for request, count in zip(batch.requests, batch.q_lens, strict=True):
            request.computed += count
            if request.computed < len(request.tokens):
                continue
            accepted = self.random.randint(0, len(request.drafts))
            self.seen["drafts rejected"] += accepted < len(request.drafts)
            request.tokens += [*request.drafts[:accepted], self.random.randrange(9)]
            request.drafts = []
            request.computed = len(request.tokens) - 1
            del request.hashes[request.computed :]
            request.output -= accepted + 1
            if request.output <= 0:
                self.running.remove(request)
                self._release(request)

    def _find_prefix(self, request: Request) -> None:
        hashes = request.known()
        while request.computed + self.page_size < len(request.tokens):
            page = self.page_of.get(hashes[request.computed + self.page_size - 1])
            if page is None:
                return
            self.seen["pages shared"] += 1
            self.seen["pages shared in the step that fills them"] += page in self.fresh
            self.free.pop(page, None)
            self.users[page] += 1
            request.pages.append(page)
            request.computed += self.page_size

    def _grow(self, request: Request, tokens: int, preempt: bool = True) -> bool:
        while len(request.pages) < ceil_div(tokens, self.page_size):
            while not self.free:
                if not preempt:
                    return False
                victim = self.running[-1]
                self.seen["requests preempted"] += 1
                self.running.remove(victim)
                self.waiting.insert(0, victim)
                victim.drafts, victim.computed = [], 0
                del victim.hashes[len(victim.tokens) :]
                self._release(victim)
                if victim is request:
                    return False
            page = self.free.popitem(last=False)[0]
            if page in self.hash_of:
                self.seen["pages evicted and filled anew"] += 1
                del self.page_of[self.hash_of.pop(page)]
            self.users[page] = 1
            request.pages.append(page)
        return True

    def _publish(self, request: Request, tokens: int) -> None:
        """Pages that are full after this step can be found; drafts may yet be rejected, so theirs cannot."""
        for n in range(min(tokens, len(request.tokens)) // self.page_size):
            page, key = request.pages[n], request.known()[(n + 1) * self.page_size - 1]
            if page not in self.hash_of and key not in self.page_of:
                self.page_of[key], self.hash_of[page] = page, key
                self.fresh.add(page)
                self.seen["pages filled by decoding"] += len(request.tokens) - request.computed <= 1

    def _release(self, request: Request) -> None:
        for page in reversed(request.pages):
            self.users[page] -= 1
            if not self.users[page]:
                self.free[page] = None
        request.pages, request.computed = [], 0

    def _batch(self, chosen: list[tuple[Request, int]]) -> Batch:
        slots = []
        for b, (request, count) in enumerate(chosen):
            self.table[b, : len(request.pages)] = torch.tensor(request.pages, dtype=torch.int32)
            places = range(request.computed, request.computed + count)
            slots += [request.pages[p // self.page_size] * self.page_size + p % self.page_size for p in places]
        q_lens = [count for _, count in chosen]
        self.seen["steps of decode rows and chunks"] += bool(q_lens) and q_lens[0] <= 1 + self.drafts < q_lens[-1]
        return Batch(
            [request for request, _ in chosen],
            q_lens,
            [request.computed + count for request, count in chosen],
            self.table[: len(chosen)].clone(),
            torch.tensor(slots, dtype=torch.int64),
        )


def random_requests(scheduler: Scheduler, count: int, longest: int, output: int) -> None:
    """Prompts that are cut from a few documents, so that many begin alike."""
    documents = [[scheduler.random.randrange(9) for _ in range(longest)] for _ in range(3)]
    for _ in range(count):
        document, spoken = scheduler.random.choice(documents), scheduler.random.randint(1, output)
        common = scheduler.random.randint(1, longest - 40)
        tail = [scheduler.random.randrange(9) for _ in range(scheduler.random.randint(0, 40))]
        scheduler.add((document[:common] + tail)[:longest], spoken)


# ---- tensors ----


def _noise(hashes: np.ndarray, channels: int, salt: int) -> np.ndarray:
    """Uniform numbers of variance 1, [n, channels]: splitmix64 of each hash and channel."""
    with np.errstate(over="ignore"):
        x = hashes[:, None] + (np.arange(channels, dtype=np.uint64) + np.uint64(salt * channels + 1)) * np.uint64(ODD)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x / 2.0**64 - 0.5) * 12**0.5


def tensors(request: Request, seq_len: int, kv_heads: int, heads: int, dim: int, layer: int = 0) -> list[Tensor]:
    """Queries [seq_len, Hq, D], keys and values [seq_len, Hkv, D] at every position, float32."""
    hashes = np.array(request.known()[:seq_len], dtype=np.uint64)
    topics = hashes[np.arange(seq_len) // TOPIC * TOPIC]
    salt = 10 * layer
    group = heads // kv_heads
    q = 0.5 * _noise(hashes, heads * dim, salt) + 0.6 * _noise(topics, heads * dim, salt + 1)
    wishes = 0.8 * _noise(topics, kv_heads * dim, salt + 2).reshape(seq_len, kv_heads, 1, dim)
    q = q.reshape(seq_len, kv_heads, group, dim) + wishes
    k = _noise(hashes, kv_heads * dim, salt + 3) + 2.0 * _noise(topics, kv_heads * dim, salt + 4)
    v = _noise(hashes, kv_heads * dim, salt + 5)
    shapes = ((seq_len, heads, dim), (seq_len, kv_heads, dim), (seq_len, kv_heads, dim))
    return [torch.from_numpy(x.astype(np.float32).reshape(shape)) for x, shape in zip((q, k, v), shapes, strict=True)]


def make_step(batch: Batch, *, kv_heads: int, heads: int, dim: int, page_size: int, block_size: int) -> Step:
    """The step with every request's keys and values unpaged; its own paged cache is a copy that nobody shares."""
    made = [tensors(r, n, kv_heads, heads, dim) for r, n in zip(batch.requests, batch.seq_lens, strict=True)]
    geometry = Geometry(
        tuple(batch.q_lens), tuple(batch.seq_lens), kv_heads, heads // kv_heads, dim, page_size, block_size, block_size
    )
    rows = torch.cat([q[n - q_len :] for (q, _, _), q_len, n in zip(made, batch.q_lens, batch.seq_lens, strict=True)])
    keys, values = [k for _, k, _ in made], [v for _, _, v in made]
    longest = max(batch.seq_lens)
    padded = [[torch.nn.functional.pad(x, (0, 0, 0, 0, 0, longest - len(x))) for x in xs] for xs in (keys, values)]
    kv = PagedKV.from_contiguous(torch.stack(padded[0]), torch.stack(padded[1]), page_size)
    return Step(geometry, rows, kv, PrefillBatch.from_lens(batch.q_lens, batch.seq_lens), keys, values)
