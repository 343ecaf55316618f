"""Unlearning that goes on from a kept state, within a query and within a stack, to the same bits."""

import copy
from dataclasses import replace

import pytest
import torch
from test_unlearning_stacked import EXACT, QUERY_IDS, RULE, dit, names_of, parts, query_of

from mucs_cli.attribution.unlearning import batch_source, unlearn, unlearn_stacked


class Stopped(BaseException):
    pass


class Kept:
    """In memory; a copy of the state after every step, or the one that ``save`` asks for."""

    def __init__(self, every_step=True):
        self.every_step, self.states, self.queries = every_step, [], None

    def begin(self, queries, state):
        self.queries, self.state = queries, state
        return self.states[-1][1] if self.states else {}

    def save_if_due(self):
        if self.every_step:
            self.save()

    def save(self):
        step, tensors = self.state()
        self.states.append((step, {name: tensor.clone() for name, tensor in tensors.items()}))


def alone(denoiser, settings, kept=None, stop_at=None, query_id=7, retains=True):
    """Steps seen, and the result; None where it was stopped in step ``stop_at``."""
    seen = []

    def on_step(query, step):
        assert query == query_id
        seen.append(step.step)
        if step.step == stop_at:
            raise Stopped

    retain, extra = parts(query_id, denoiser, retains=retains)
    arguments = (*query_of(query_id, denoiser), retain, settings, 0, query_id, on_step)
    try:
        return seen, unlearn(copy.deepcopy(denoiser), names_of(denoiser), *arguments, checkpoints=kept, **extra)
    except Stopped:
        return seen, None


def together(denoiser, settings, kept=None, stop_at=None, ids=QUERY_IDS):
    """Steps seen, and the results, until step ``stop_at``."""
    seen, results = [], {}

    def on_step(query, step):
        seen.append((query, step.step))
        if step.step == stop_at:
            raise Stopped

    sources = []
    for query_id in ids:
        retain, extra = parts(query_id, denoiser)
        sources.append(batch_source(denoiser, *query_of(query_id, denoiser), retain, settings, 0, query_id, **extra))
    try:
        for query_id, result in unlearn_stacked(
            denoiser, names_of(denoiser), sources, settings, on_step, checkpoints=kept
        ):
            results[query_id] = result
    except Stopped:
        pass
    return seen, results


def assert_same_bits(ours, theirs):
    assert (ours.num_steps, ours.reached_bound, ours.log) == (theirs.num_steps, theirs.reached_bound, theirs.log)
    assert (ours.base_query_loss, ours.query_loss) == (theirs.base_query_loss, theirs.query_loss)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items())


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize(("settings", "retains"), [(RULE, True), (EXACT, True), (EXACT, False)])
def test_a_query_goes_on_from_any_step_to_the_same_bits(optimizer, settings, retains):
    settings = replace(settings, optimizer=optimizer, null_loss=4.0 if settings is RULE else None)
    if optimizer == "sgd":
        settings = replace(settings, learning_rate=0.1)
    denoiser = dit()
    steps, whole = alone(denoiser, settings, retains=retains)
    assert len(steps) >= 4
    for stop_at in (0, 1, 3):
        kept = Kept()
        assert alone(denoiser, settings, kept, stop_at, retains=retains) == (list(range(stop_at + 1)), None)
        again, result = alone(denoiser, settings, kept, retains=retains)
        assert again == steps[stop_at:]
        assert_same_bits(result, whole)
    moved = [name for name, p in denoiser.network.named_parameters() if name in whole.tensors]
    own = dict(denoiser.network.named_parameters())
    assert any(not torch.equal(whole.tensors[name], own[name]) for name in moved)


def test_in_the_middle_of_a_step_the_state_is_that_before_it():
    kept = Kept(every_step=False)
    denoiser = dit()
    alone(denoiser, RULE, kept, stop_at=3)
    kept.save()  # as an interruption does, with the losses of step 3 noted and its update not taken
    ((step, tensors),) = kept.states
    assert (step, tensors["log"].shape) == (3, (1, 3, 2))
    again, result = alone(denoiser, RULE, kept)
    assert again[0] == 3
    assert_same_bits(result, alone(denoiser, RULE)[1])


def test_a_stack_goes_on_to_the_same_bits_before_and_after_some_of_it_has_stopped():
    denoiser = dit()
    steps, whole = together(denoiser, RULE)
    ends = sorted(result.num_steps for result in whole.values())
    assert len(set(ends)) == len(QUERY_IDS)
    for stop_at in (1, ends[0], ends[0] + 1, ends[-1]):
        kept = Kept()
        _, first = together(denoiser, RULE, kept, stop_at)
        again, rest = together(denoiser, RULE, kept, ids=kept.queries if stop_at < ends[0] else _left(kept))
        assert again[0][1] == stop_at
        assert {**first, **rest}.keys() == whole.keys()
        for query_id, result in rest.items():
            assert_same_bits(result, whole[query_id])
    assert kept.queries == list(QUERY_IDS) or len(kept.queries) < len(QUERY_IDS)
    assert len(steps) > len(again)


def _left(kept):
    """The queries of the newest state."""
    return kept.states[-1][1]["query_id"].tolist()


def test_before_one_of_a_stack_is_done_the_state_of_all_is_kept_from_which_the_others_have_the_same_bits():
    denoiser = dit()
    _, whole = together(denoiser, RULE)
    first = min(whole, key=lambda query: whole[query].num_steps)
    kept = Kept(every_step=False)
    together(denoiser, RULE, kept, stop_at=whole[first].num_steps + 1)
    ((step, tensors),) = kept.states
    assert (step, tensors["query_id"].tolist()) == (whole[first].num_steps, list(QUERY_IDS))
    _, again = together(denoiser, RULE, kept)
    assert again.keys() == whole.keys()
    for query_id, result in again.items():
        assert_same_bits(result, whole[query_id])
