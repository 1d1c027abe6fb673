"""Random sequences of operations on the packed caches and on mlx-lm's own.

``MLX_KVQ_SEQUENCES=10000 python -m pytest tests/caches/test_cache_states.py`` runs that many new
sequences of each machine; without it a small fixed set runs.
"""

import os
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from mlx_lm.models import cache as stock_caches

from mlx_kvq import ops
from mlx_kvq.caches import attention
from mlx_kvq.caches.rotating import PackedRotatingKVCache
from mlx_kvq.caches.single import PackedKVCache
from mlx_kvq.format import format as format_module
from tests.support.stock import Pair, Tokens

SEQUENCES = int(os.environ.get("MLX_KVQ_SEQUENCES", "0"))
FEW = 125  # sequences of a machine in CI
OPERATIONS = 25  # of a sequence, at most
BLOCK = 16  # of a prompt in place of 256
GROWTH = 4  # times the exact tail, in place of 128
STEP = 8  # capacity steps in place of 256, so that short sequences cross them

TOKENS = {
    "plain": Tokens("int4-srft:recent=0,first=0", count=1024),
    "calibrated": Tokens("k8v4-srht:seed=7", calibrated=True, count=1024),
    "exact 3": Tokens("int4-srft:recent=3", count=1024),
}
# max_size and keep; mlx-lm's ring needs keep < max_size.
WINDOWS = [(1, 0), (2, 1), (5, 0), (5, 4), (8, 0), (8, 4), (12, 1), (20, 0), (20, 4), (30, 29)]

windows = st.sampled_from([None, None, None, 1, 3, 6, 12, 40])


class CacheMachine(RuleBasedStateMachine):
    """What every machine over caches has: fresh tokens, and all caches checked at the end."""

    def __init__(self):
        super().__init__()
        self.next = 0
        self.made: list[Pair] = []
        self.folder = tempfile.TemporaryDirectory(prefix="mlx_kvq-")

    def fresh(self, B: int, L: int) -> np.ndarray:
        """[B, L] tokens that no cache holds yet (the table starts over after 1024)."""
        ids = np.arange(self.next, self.next + B * L) % 1024
        self.next += B * L
        return ids.reshape(B, L)

    def keep(self, pair: Pair) -> Pair:
        self.made.append(pair)
        return pair

    @property
    def file(self) -> Path:
        return Path(self.folder.name) / "cache.safetensors"

    def teardown(self):
        self.folder.cleanup()
        for pair in self.made:  # none was changed by an operation on another
            pair.check()
            if not pair.stock.empty():
                pair.ours.keys_and_values()  # writes what waits to be written
            pair.check()


class OneSequence(CacheMachine):
    """Caches of one sequence each: what generate, the server's prompt cache and drafts do."""

    pairs = Bundle("pairs")

    @initialize(target=pairs, tokens=st.sampled_from(sorted(TOKENS)))
    def growing(self, tokens):
        return self.keep(Pair.growing(TOKENS[tokens]))

    @initialize(
        target=pairs, tokens=st.sampled_from(sorted(TOKENS)), window=st.sampled_from(WINDOWS)
    )
    def rotating(self, tokens, window):
        return self.keep(Pair.rotating(TOKENS[tokens], *window))

    @rule(pair=pairs, L=st.integers(2, 40), window_size=windows, return_array=st.booleans())
    def prefill(self, pair, L, window_size, return_array):
        pair.step(self.fresh(1, L), window_size=window_size, return_array=return_array)

    @rule(pair=pairs, count=st.integers(1, 12), window_size=windows)
    def decode(self, pair, count, window_size):
        for _ in range(count):
            pair.step(self.fresh(1, 1), window_size=window_size)

    @rule(pair=pairs, L=st.integers(1, 40))
    def update(self, pair, L):
        pair.update(self.fresh(1, L))

    @rule(pair=pairs, n=st.integers(0, 25))
    def trim(self, pair, n):
        pair.trim(n)

    @rule(pair=pairs, L=st.integers(2, 9), n=st.integers(0, 8))
    def speculate(self, pair, L, n):
        """A chunk of guesses, of which the last n are wrong."""
        pair.speculate(self.fresh(1, L), min(n, L - 1))

    @rule(pair=pairs, N=st.integers(1, 40), window_size=windows, return_array=st.booleans())
    def make_mask(self, pair, N, window_size, return_array):
        pair.make_mask(N, window_size=window_size, return_array=return_array)

    @rule(target=pairs, pair=pairs)
    def copy(self, pair):
        return self.keep(pair.fork())

    @rule(pair=pairs)
    def state_round_trip(self, pair):
        pair.state_round_trip()

    @rule(pair=pairs)
    def save_and_load(self, pair):
        pair.save_and_load(self.file)

    @rule(pair=pairs)
    def evaluate(self, pair):
        mx.eval([pair.ours.state])


@pytest.mark.parametrize("waiting", [False, True], ids=["written", "waiting"])
def test_sequences_of_operations(waiting, monkeypatch):
    """Rows are written at once, as plain operations need it, or wait, as on GPUs."""
    monkeypatch.setattr(attention, "BLOCK", BLOCK)
    monkeypatch.setattr(format_module, "GROWTH", GROWTH)
    if waiting:
        monkeypatch.setattr(ops, "is_reference", lambda *_: False)
    for ours in (PackedKVCache, PackedRotatingKVCache):
        stock = getattr(stock_caches, ours.__name__.removeprefix("Packed"))
        monkeypatch.setattr(ours, "step", STEP)
        monkeypatch.setattr(stock, "step", STEP)
        monkeypatch.setattr(stock_caches, ours.__name__, ours, raising=False)
    run_state_machine_as_test(
        OneSequence,
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
