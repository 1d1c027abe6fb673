"""Random sequences of operations on single and batch caches, packed and mlx-lm's own.

``MLX_KVQ_SEQUENCES=10000 python -m pytest tests/caches/test_batch_states.py`` runs that many new
sequences; without it a small fixed set runs.
"""

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, initialize, rule, run_state_machine_as_test
from mlx_lm.models import cache as stock_caches

from mlx_kvq import ops
from mlx_kvq.caches import attention, seams
from mlx_kvq.format import format as format_module
from tests.caches.test_cache_states import BLOCK, GROWTH, OPERATIONS, SEQUENCES, STEP, CacheMachine
from tests.support.stock import Pair
from tests.support.stock_batch import BatchPair, PaddedTokens, same_kind

FEW = 120  # sequences in CI
MOST = 4  # sequences in a batch

TOKENS = {
    "plain": PaddedTokens("int4-srft:recent=0,first=0", count=1024),
    "calibrated": PaddedTokens("k8v4-srht:seed=7", calibrated=True, count=1024),
    "exact": PaddedTokens("int4-srft:recent=3", count=1024),
}
# Batches take caches of one kind, so there are few kinds, and many caches of each.
KINDS = [None, (5, 0), (8, 4), (20, 0)]  # growing, or max_size and keep

formats = st.sampled_from(["exact", "exact", "calibrated", "plain"])
kinds = st.sampled_from(KINDS)
windows = st.sampled_from([None, None, None, 1, 3, 6, 12, 40])
prompts = st.lists(st.integers(1, 40), min_size=MOST, max_size=MOST)


class Batches(CacheMachine):
    """What the server does: prompts in a batch, sequences that come and go, caches reused."""

    singles = Bundle("singles")
    batches = Bundle("batches")

    @initialize(target=batches, tokens=formats, kind=kinds, B=st.integers(1, 4))
    def begin(self, tokens, kind, B):
        return self._merge([self._single(TOKENS[tokens], kind) for _ in range(B)])

    def _single(self, tokens, kind) -> Pair:
        return Pair.growing(tokens) if kind is None else Pair.rotating(tokens, *kind)

    def _merge(self, pairs):
        return self.keep(BatchPair.merge(pairs))

    @rule(target=singles, tokens=formats, kind=kinds, lengths=st.lists(st.integers(1, 20)))
    def single(self, tokens, kind, lengths):
        pair = self._single(TOKENS[tokens], kind)
        for L in lengths[:3]:
            pair.update(self.fresh(1, L))
        return self.keep(pair)

    @rule(
        target=batches, tokens=formats, kind=kinds, padding=st.lists(st.integers(0, 9), min_size=1)
    )
    def left_padded(self, tokens, kind, padding):
        """A batch whose prompts come padded on the left, announced in two ways."""
        padding = padding[:MOST]
        made = [0] * len(padding)
        if kind is None:
            pair = BatchPair.growing(TOKENS[tokens], made)
        else:
            pair = BatchPair.rotating(TOKENS[tokens], kind[0], made)
        for cache in (pair.ours, pair.stock):
            cache.prepare(left_padding=padding)
        pair.step(self.fresh(len(padding), max(padding) + 3))
        return self.keep(pair)

    @rule(target=batches, single=singles, others=st.lists(singles, max_size=MOST - 1))
    def merge(self, single, others):
        return self._merge([single, *(o for o in others if same_kind(single, o))])

    @rule(batch=batches, lengths=prompts, chunk=st.sampled_from([2048, 2048, 7, 3]))
    def prompt(self, batch, lengths, chunk):
        lengths = lengths[: batch.size]
        if max(lengths) % chunk == 1:  # mlx-lm's rotating batch cannot take a padded one-token end
            chunk = 2048
        batch.prompt([self.fresh(1, n)[0] for n in lengths], chunk)

    @rule(batch=batches, count=st.integers(1, 10), window_size=windows)
    def decode(self, batch, count, window_size):
        for _ in range(count):
            batch.step(self.fresh(batch.size, 1), window_size=window_size)

    @rule(batch=batches, L=st.integers(1, 30))
    def update(self, batch, L):
        batch.update(self.fresh(batch.size, L))

    @rule(batch=batches, n=st.integers(0, 25))
    def trim(self, batch, n):
        batch.trim(max(0, min(n, *batch.sequences, batch.stock.size())))

    @rule(batch=batches, which=st.lists(st.integers(0, 999), min_size=1, unique=True))
    def filter(self, batch, which):
        if not batch.stock.empty():  # mlx-lm's moves the index of one that holds nothing
            batch.filter(sorted({i % batch.size for i in which}))

    @rule(batch=batches, other=batches)
    def extend(self, batch, other):
        if same_kind(batch, other) and batch.size + other.size <= MOST:
            batch.extend(other.fork())

    @rule(target=singles, batch=batches, i=st.integers(0, 999))
    def extract(self, batch, i):
        if batch.stock.empty():
            return self.keep(Pair.growing(batch.tokens))
        return self.keep(batch.extract(i % batch.size))

    @rule(single=singles, L=st.integers(1, 20))
    def go_on_alone(self, single, L):
        single.step(self.fresh(1, L))

    @rule(single=singles, n=st.integers(0, 25))
    def trim_alone(self, single, n):
        single.trim(n)

    @rule(batch=batches, N=st.integers(1, 40), window_size=windows)
    def make_mask(self, batch, N, window_size):
        batch.make_mask(N, window_size=window_size)

    @rule(target=batches, batch=batches)
    def copy(self, batch):
        return self.keep(batch.fork())

    @rule(batch=batches)
    def state_round_trip(self, batch):
        batch.state_round_trip()

    @rule(batch=batches)
    def save_and_load(self, batch):
        batch.save_and_load(self.file)

    @rule(batch=batches)
    def evaluate(self, batch):
        mx.eval([batch.ours.state])


@pytest.mark.parametrize("waiting", [False, True], ids=["written", "waiting"])
def test_sequences_of_operations(waiting, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", BLOCK)
    monkeypatch.setattr(format_module, "GROWTH", GROWTH)
    if waiting:
        monkeypatch.setattr(ops, "is_reference", lambda *_: False)
    for ours in seams.CLASSES:
        stock = getattr(stock_caches, ours.__name__.removeprefix("Packed"))
        monkeypatch.setattr(ours, "step", STEP)
        monkeypatch.setattr(stock, "step", STEP)
        monkeypatch.setattr(stock_caches, ours.__name__, ours, raising=False)
    run_state_machine_as_test(
        Batches,
        settings=settings(
            max_examples=SEQUENCES or FEW,
            stateful_step_count=OPERATIONS,
            derandomize=not SEQUENCES,
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
