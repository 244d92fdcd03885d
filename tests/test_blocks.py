"""All pairs at once, in blocks of queries, and by the backend's kernel: one result, less memory.

And what goes with blocks: dropout whose draws a backward pass repeats, means that are taken
before projections, one trace for each shape.
"""

import dataclasses
import math
import re

import backends
import keras
import numpy as np
import pytest
from members import FEW, MEMBERS, few_where_compiled
from problems import assert_close
from test_forms import arrays, check_same, value_and_gradients

from keras_pdattn import Primal, analysis, feature_maps, layers, ops, primals
from keras_pdattn.layers import projections
from keras_pdattn.ops import dual, fused, kernels, native, running_means, states
from keras_pdattn.ops.examples import Examples, OwnExample
from keras_pdattn.training_sets import AllKeys, ScaledHeads, SlidingWindow, TrainingSet
from keras_pdattn.transforms import BatchNorm, Transform

#: Members that work through the weights of all pairs.
DUAL = [
    Primal(),
    Primal(transform="batch_norm"),
    Primal(training_set=ScaledHeads((1, 3))),
    Primal("taylor"),
    Primal("positive_random", training_set=ScaledHeads((1, 3))),
    Primal(training_set=SlidingWindow(9, 2, 1)),
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 queries, so that short sequences take several."""
    monkeypatch.setattr(dual, "LEAST_BLOCK", 8)
    monkeypatch.setattr(dual, "MOST_ROWS", 8)
    monkeypatch.setattr(dual, "MOST_WHOLE", 0)
    monkeypatch.setattr(dual, "TIMES_ON_GPU", 1)
    monkeypatch.setattr(fused, "CAUSAL_BLOCK", 8)
    monkeypatch.setattr(fused, "CAUSAL_BLOCK_ON_GPU", 8)
    monkeypatch.setattr(fused, "LEAST_WITH_OWN", 0)
    # Nor all scales in one call, which is the faster for few queries.
    monkeypatch.setattr(running_means, "are_faster", lambda *arguments: False)


@pytest.fixture
def heads_apart(small_blocks, monkeypatch):
    """One head of one sequence after the other, in such blocks."""
    monkeypatch.setattr(dual, "takes_heads_apart", lambda *arguments: True)
    monkeypatch.setattr(dual, "MOST_OF_HEAD", 0)
    monkeypatch.setattr(dual, "LEAST_OF_HEAD", 8)


def in_small_blocks(form, request):
    """The `form` to ask for, where blocks take 8 queries; "heads apart" are in blocks."""
    request.getfixturevalue("heads_apart" if form == "heads apart" else "small_blocks")
    return "blocks" if form == "heads apart" else form


def masks_of(kind, query_length, key_length, heads=2):
    rng = np.random.default_rng(2)
    if kind == "padded":
        key_mask = rng.random((2, key_length)) < 0.7
        key_mask[1, :4] = False
        return {"key_mask": key_mask, "query_mask": rng.random((2, query_length)) < 0.8}
    if kind == "masked":
        return {"mask": rng.random((2, 1, query_length, key_length)) < 0.8}
    if kind == "by head":
        return {"mask": rng.random((1, heads, query_length, key_length)) < 0.8}
    if kind == "for all queries":
        return {"mask": rng.random((2, heads, 1, key_length)) < 0.8}
    if kind == "all":
        mask = rng.random((2, heads, query_length, key_length)) < 0.8
        return {**masks_of("padded", query_length, key_length), "mask": mask}
    return {}


#: Others than torch compile each case, for seconds.
IS_QUICK = backends.BACKEND == "torch"
#: The first two hold what the others do.
KINDS = ["padded", "by head", "plain", "masked"][: 4 if IS_QUICK else 2]


def check_blocks(primal, lengths, is_causal, kind, heads=2):
    """Blocks give the outputs and the gradients of the whole."""
    inputs = arrays(*lengths, heads, batch=2)
    options = {"is_causal": is_causal, **masks_of(kind, *lengths, heads)}
    whole, blocks = (
        value_and_gradients(primal, inputs, form=form, **options) for form in ("whole", "blocks")
    )
    # A prefix of one key has no spread, and gradients of batch norm of a thousand.
    check_same(blocks, whole, tolerance=5e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("primal", DUAL, ids=lambda primal: str(primal)[:60])
def test_blocks_are_the_whole(small_blocks, primal, is_causal, kind):
    """Outputs and gradients, whatever limits each query; the last block is ragged."""
    check_blocks(primal, (21, 18), is_causal, kind)


@pytest.mark.parametrize("kind", ["all", *KINDS][: 5 if IS_QUICK else 1])
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("primal", DUAL, ids=lambda primal: str(primal)[:60])
def test_heads_apart_are_the_whole(heads_apart, primal, is_causal, kind):
    """Outputs and gradients, where sequences and heads differ in all that limits queries."""
    check_blocks(primal, (21, 18), is_causal, kind)


@pytest.mark.parametrize("kind", ["by head", "masked", "for all queries"])
def test_heads_apart_with_masks_of_any_shape(heads_apart, kind):
    """And with several heads in a group."""
    check_blocks(OWN, (21, 18), True, kind, heads=4)


@pytest.mark.skipif(backends.BACKEND != "jax", reason="only JAX shows what a loop keeps")
def test_heads_apart_keep_one_mask(heads_apart):
    """For the backward pass: that of each sequence, not one for each head."""
    inputs = arrays(48, heads=4, batch=2)

    def loss(*tensors):
        mask = keras.ops.ones((2, 1, 48, 48), dtype="bool")
        return keras.ops.sum(ops.attention(*tensors, "softmax", mask=mask, form="blocks"))

    assert largest_on_jax(loss, inputs) == 2 * 48 * 48


@pytest.mark.parametrize(
    ("form", "primal"), [("blocks", DUAL[1]), ("heads apart", DUAL[0])], ids=["bn", "softmax"]
)
def test_blocks_in_a_compiled_step(form, primal, request, monkeypatch):
    """As `fit` compiles them, with padding, causal pieces and lengths that are known."""
    weights = []
    x = np.random.default_rng(0).normal(size=(2, 41, 6)).astype("float32")
    x[1, 33:] = 0
    for is_whole in (True, False):
        if not is_whole:
            in_small_blocks(form, request)
            monkeypatch.setattr(dual, "LEAST_PIECE", 18)
            monkeypatch.setattr(fused, "is_fastest", lambda query, examples: False)
        keras.utils.set_random_seed(0)
        inputs = keras.Input((41, 6))
        masked = keras.layers.Masking()(inputs)
        layer = layers.PrimalDualAttention(2, 4, primal=primal)
        model = keras.Model(inputs, layer(masked, masked, use_causal_mask=True))
        model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=backends.BACKEND != "torch")
        model.fit(x, np.ones((2, 41, 6)), verbose=0)
        weights.append(model.get_weights())
    for one, other in zip(*weights):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("form", ["blocks", "heads apart"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
def test_no_queries_in_blocks(form, is_causal, request):
    form = in_small_blocks(form, request)
    x = np.ones((1, 5, 2, 4), "float32")
    for query, key in ((x[:, :0], x), (x, x[:, :0]), (x[:0], x[:0])):
        output = ops.attention(query, key, key, "softmax", is_causal=is_causal, form=form)
        assert output.shape == query.shape
        assert not backends.to_numpy(output).any()


def test_pieces_of_keys_of_unknown_length(small_blocks, monkeypatch):
    """Of causal queries in a window that a mask keeps from bands."""
    monkeypatch.setattr(dual, "LEAST_PIECE", 18)
    primal = Primal(training_set=SlidingWindow(9))
    query, key, _ = arrays(41, 36)
    mask = masks_of("masked", 41, 36)["mask"][:1]

    def attend(query, key, mask):
        return ops.attention(query, key, key, primal, mask=mask, is_causal=True)

    shapes = {"query": (1, 41, 2, 4), "key": (1, None, 2, 4), "mask": (1, 1, 41, None)}
    tensors = [keras.ops.convert_to_tensor(x) for x in (query, key, mask)]
    found = backends.compiled(attend, shapes)(*tensors)
    whole = ops.attention(query, key, key, primal, mask=mask, is_causal=True, form="whole")
    assert_close(backends.to_numpy(found), backends.to_numpy(whole), 1e-5)


def test_pieces_of_running_means(small_blocks, monkeypatch):
    """A piece reads its own examples, not those of the first one."""
    monkeypatch.setattr(dual, "LEAST_PIECE", 18)
    outputs = []
    for are_faster in (False, True):
        monkeypatch.setattr(running_means, "are_faster", lambda *_, answer=are_faster: answer)
        # Dropout of hardly anything, which no kernel of torch's takes.
        outputs.append(
            ops.attention(*arrays(41), OWN, is_causal=True, dropout=1e-9, seed=1, form="blocks")
        )
    assert_close(*(backends.to_numpy(x) for x in outputs), 1e-5)


@pytest.mark.skipif(backends.BACKEND != "tensorflow", reason="others have one way to loop")
def test_tensorflow_works_each_block_once(heads_apart, monkeypatch):
    """Also where it runs eagerly."""
    called, weigh = [], kernels.masked_softmax

    def record(*arguments):
        called.append(True)
        return weigh(*arguments)

    monkeypatch.setattr(kernels, "masked_softmax", record)
    ops.attention(*arrays(21), "softmax", form="blocks")
    assert len(called) == 2 * 3


@pytest.mark.parametrize("lengths", [(41, 36), (36, 41)][:: 1 if IS_QUICK else 2], ids=str)
@pytest.mark.parametrize("primal", DUAL, ids=lambda primal: str(primal)[:60])
def test_causal_pieces_are_the_whole(small_blocks, monkeypatch, primal, lengths):
    """Outputs and gradients; the last piece is ragged, the last queries may be behind all keys."""
    monkeypatch.setattr(dual, "LEAST_PIECE", 18)
    check_blocks(primal, lengths, True, "all")


def test_causal_pieces(monkeypatch):
    """Of long causal queries; a piece is not cut again."""
    monkeypatch.setattr(dual, "LEAST_PIECE", 10)
    key = np.zeros((1, 50, 2, 4), "float32")

    def pieces(length, *arguments):
        return dual.causal_pieces(length, Examples.keys(key, key, length, *arguments))

    assert len(pieces(19, True)) == 1
    assert pieces(21, True) == [slice(0, 11), slice(11, 21)]
    assert len(pieces(10**6, True)) == dual.MOST_PIECES
    assert not pieces(50, False)
    assert not pieces(50, True, 7)
    examples = Examples.keys(key, key, 50, True).of_block(slice(20, 40))
    assert examples.key.shape[1] == 40
    assert not dual.causal_pieces(20, examples)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 64])
def test_blocks_of_any_length(small_blocks, length):
    inputs = arrays(length, batch=2)
    for is_causal in (False, True):
        whole, blocks = (
            value_and_gradients(Primal(), inputs, form=form, is_causal=is_causal)
            for form in ("whole", "blocks")
        )
        check_same(blocks, whole)


@pytest.mark.parametrize("kind", ["plain", "padded", "masked"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
def test_the_kernel_of_the_backend(is_causal, kind):
    inputs = arrays(21, 18, batch=2)
    options = {"is_causal": is_causal, **masks_of(kind, 21, 18)}
    whole, by_kernel = (
        value_and_gradients(Primal(), inputs, form=form, **options) for form in ("whole", "fused")
    )
    check_same(by_kernel, whole)


#: Members whose causal queries see what a kernel has no flag for.
OWN = Primal(training_set=ScaledHeads((1, 3)))
# With a usual epsilon, scores of a prefix without spread are hundreds, of whose exponentials
# a kernel's backward pass rounds off a tenth of a permille: a test of conditioning.
OWN_NORMALISED = Primal(transform=BatchNorm(epsilon=0.1), training_set=ScaledHeads((2, 3)))
WIDE_WINDOW = Primal(training_set=SlidingWindow(17, global_tokens=2))


#: Other backends have no such kernel, and work as in the tests above.
LENGTHS = [(21, 18), (18, 21), (16, 16)][: 3 if IS_QUICK else 1]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "padded", "by head"])
@pytest.mark.parametrize("primal", [Primal(), OWN, OWN_NORMALISED, WIDE_WINDOW], ids=str)
def test_causal_kernel_in_blocks(small_blocks, primal, kind, lengths):
    """What is fastest here, for every limit that a causal query may have besides."""
    inputs = arrays(*lengths, batch=2)
    options = {"is_causal": True, **masks_of(kind, *lengths)}
    whole, fastest = (
        value_and_gradients(primal, inputs, form=form, **options) for form in ("whole", None)
    )
    check_same(fastest, whole, tolerance=5e-5)


@pytest.mark.parametrize("lengths", [(1, 1), (7, 7), (18, 21), (25, 25)], ids=str)
@pytest.mark.parametrize("primal", [OWN, OWN_NORMALISED], ids=str)
def test_causal_scaled_heads_by_place(monkeypatch, primal, lengths):
    """Queries at one place of their windows are heads of the kernel: not one mask is made."""
    masks, attend = [], native.softmax_attention

    def record(query, key, value, mask, scale, is_causal, *rest):
        masks.append(mask)
        assert is_causal
        return attend(query, key, value, mask, scale, is_causal, *rest)

    monkeypatch.setattr(fused, "is_fastest", lambda query, examples: True)
    monkeypatch.setattr(fused, "can_fuse", lambda examples: True)
    monkeypatch.setattr(running_means, "are_faster", lambda *arguments: False)
    monkeypatch.setattr(native, "softmax_attention", record)
    inputs = arrays(*lengths, batch=2)
    whole, by_place = (
        value_and_gradients(primal, inputs, form=form, is_causal=True) for form in ("whole", None)
    )
    assert len(masks) >= 2
    assert all(mask is None for mask in masks)
    check_same(by_place, whole, tolerance=5e-5)


@pytest.fixture
def on_gpu(monkeypatch):
    """JAX as on a GPU, where kernels take float32 too; the mask in each call of one with lengths.

    The kernel is that of XLA for CPUs.
    """
    calls, attend = [], native.softmax_attention_of_lengths

    def record(query, key, value, query_lengths, key_lengths, scale, is_causal, mask=None):
        calls.append(mask)
        assert query.shape[1] % 2 == key.shape[1] % 2 == 0
        return attend(query, key, value, query_lengths, key_lengths, scale, is_causal, mask)

    monkeypatch.setattr(native, "jax_runs_on_gpu", lambda: True)
    monkeypatch.setattr(native, "runs_on_gpu", lambda: False)
    monkeypatch.setattr(native.jax_native, "has_cudnn", lambda dtype, depth: True)
    monkeypatch.setattr(native, "softmax_attention_of_lengths", record)
    monkeypatch.setattr(fused, "accumulator", lambda dtype: "float64")
    return calls


class HalfAsSharp(feature_maps.Softmax):
    """A user's kernel, of which `attend` alone is another."""

    def attend(self, query, *arguments):
        return super().attend(query / 2, *arguments)


only_on_jax = pytest.mark.skipif(
    backends.BACKEND != "jax", reason="no other backend has a kernel that takes lengths"
)


@only_on_jax
@few_where_compiled("lengths", [(1, 1), (18, 21), (25, 25)], few=[(1, 1), (18, 21)])
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
@few_where_compiled("scales", [(2, 3), (3, 2, 1)], few=[(3, 2, 1)])
@pytest.mark.parametrize("transform", [None, BatchNorm(epsilon=0.1)], ids=str)
def test_groups_by_one_kernel(on_gpu, transform, scales, is_causal, lengths):
    """One call for all heads, of which three in two groups are not even."""
    primal = Primal(transform=transform, training_set=ScaledHeads(scales))
    inputs = arrays(*lengths, batch=2, heads=3)
    whole = value_and_gradients(primal, inputs, form="whole", is_causal=is_causal)
    assert not on_gpu
    together = value_and_gradients(primal, inputs, is_causal=is_causal)
    assert len(on_gpu) == 1
    check_same(together, whole, tolerance=5e-5)


@only_on_jax
def test_a_feature_hides_padding_whatever_its_score(on_gpu):
    """In float16, where scores over the root of epsilon are as low as any number."""
    x = keras.ops.cast(np.random.default_rng(0).normal(size=(1, 8, 4, 8)), "float16")
    output = ops.attention(x, x, x, "batch_norm", key_mask=np.arange(8)[np.newaxis] < 1)
    assert on_gpu == [None]
    expected = np.broadcast_to(backends.to_numpy(x[:, :1]), output.shape)
    np.testing.assert_allclose(backends.to_numpy(output), expected, atol=1e-2)


@only_on_jax
def test_groups_that_one_kernel_does_not_take(on_gpu, monkeypatch):
    """Masks, dropout, scores, a form that is asked for; and what would mostly be filled up."""
    together, answer = [], fused._answer_together

    def record(calls, scale):
        together.append(len(calls))
        return answer(calls, scale)

    monkeypatch.setattr(fused, "_answer_together", record)
    inputs, key_mask = arrays(64), np.arange(64)[None] < 60

    def attend(primal, **options):
        return backends.jitted(lambda *x: ops.attention(*x, primal, **options))(*inputs)

    for options in (
        {"key_mask": key_mask},
        {"key_mask": key_mask, "is_causal": True},
        {"mask": np.ones((1, 1, 64, 64), bool)},
        {"dropout": 0.5, "seed": 1},
        {"return_scores": True},
        {"form": "blocks"},
        {"flash_attention": False},
        {"query_start": 3, "is_causal": True},
    ):
        attend(OWN, **options)
    attend(Primal(HalfAsSharp(), training_set=ScaledHeads((1, 3))))
    far_apart = Primal(training_set=ScaledHeads((1, 64)))
    attend(far_apart, is_causal=True)
    attend("softmax")
    attend(Primal("elu", training_set=ScaledHeads((1, 3))))
    assert not together
    attend(far_apart)
    assert together == [2]
    # Enough queries for a GPU as they are: only those of one length are not filled up for it.
    monkeypatch.setattr(fused, "MOST_FILLED", 64)
    attend(OWN, is_causal=True)
    assert together == [2]
    attend(OWN)
    assert together == [2, 2]
    monkeypatch.setattr(native.jax_native, "has_cudnn", lambda dtype, depth: False)
    attend(far_apart)
    assert together == [2, 2]


@only_on_jax
@few_where_compiled("kind", ["plain", "padded", "masked", "by head"], few=["padded", "by head"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("primal", [Primal(), OWN], ids=str)
@few_where_compiled("lengths", [(21, 18), (18, 21)], few=[(21, 18)])
def test_shapes_that_cudnn_takes_in_jax(on_gpu, primal, is_causal, kind, lengths):
    """Even lengths, and masks of queries times keys, whatever limits queries."""
    inputs = arrays(*lengths, batch=2)
    options = {"is_causal": is_causal, **masks_of(kind, *lengths)}
    whole, by_kernel = (
        value_and_gradients(primal, inputs, form=form, **options) for form in ("whole", None)
    )
    assert on_gpu or is_causal
    has_masks = kind in ("masked", "by head") or (primal is OWN and is_causal)
    assert has_masks or all(mask is None for mask in on_gpu)
    check_same(by_kernel, whole, tolerance=5e-5)


@only_on_jax
def test_padding_by_a_feature_in_16_bits(on_gpu):
    """Zeros for a row of padding alone, finite gradients, and no score of a hidden key."""
    key_mask = np.ones((2, 18), bool)
    key_mask[1], key_mask[0, 9:] = False, False

    def attend(*tensors):
        narrow = [keras.ops.cast(30 * x, "bfloat16") for x in tensors]
        return keras.ops.cast(ops.attention(*narrow, "softmax", key_mask=key_mask), "float32")

    inputs = arrays(21, 18, batch=2)
    output = backends.to_numpy(attend(*inputs))
    assert on_gpu == [None]
    assert not output[1].any()
    inputs[2][0, 9:] = 1e4
    assert_close(backends.to_numpy(attend(*inputs)), output, 0)
    for gradient in backends.gradients(lambda *x: keras.ops.sum(attend(*x)), inputs):
        assert np.isfinite(gradient).all()
        assert not gradient[1].any()


@pytest.mark.parametrize("depths", [(1, 1), (2, 2), (2, 40), (40, 2)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "padded"])
def test_own_examples_of_any_depth(small_blocks, kind, depths):
    """Features for them fill vectors up to a width that the kernel takes."""
    rng = np.random.default_rng(0)
    sizes = (depths[0], depths[0], depths[1])
    inputs = [rng.normal(size=(2, 21, 2, size)).astype("float32") for size in sizes]
    options = {"is_causal": True, **masks_of(kind, 21, 21)}
    whole, fastest = (ops.attention(*inputs, OWN, form=form, **options) for form in ("whole", None))
    assert_close(backends.to_numpy(fastest), backends.to_numpy(whole), 1e-5)


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "positive_random"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
def test_own_examples_that_users_give(small_blocks, is_causal, feature_map):
    """A key of each query's own besides all others, that of scaled heads or not."""

    class Sink(TrainingSet):
        def select(self, keys, queries):
            own = OwnExample(queries.x, 0 * queries.x)
            return dataclasses.replace(keys, own=own)

        def has_causal_form(self, num_axes):
            return True

    inputs, primal = arrays(21, batch=2), Primal(feature_map, training_set=Sink())
    whole, *others = (
        ops.attention(*inputs, primal, is_causal=is_causal, form=form)
        for form in ("whole", "blocks", None)
    )
    for other in others:
        assert_close(backends.to_numpy(other), backends.to_numpy(whole), 1e-5)


class TwiceAsSharp(feature_maps.Softmax):
    """A user's kernel, of which `weigh` alone is another."""

    def weigh(self, parts):
        return super().weigh([(2 * products, *rest) for products, *rest in parts])


@pytest.mark.parametrize("form", ["whole", "blocks"])
def test_a_user_weighs_own_examples_like_all_others(small_blocks, form):
    query, key, value = arrays(21, batch=2)
    found, expected = (
        ops.attention(x, key, value, Primal(kernel, training_set=ScaledHeads((1, 3))), **options)
        for x, kernel, options in (
            (query, TwiceAsSharp(), {"is_causal": True, "form": form}),
            (2 * query, "softmax", {"is_causal": True, "form": "whole"}),
        )
    )
    assert_close(backends.to_numpy(found), backends.to_numpy(expected), 1e-5)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Counted(Examples):
    """A user's record, which looks at what it is made of."""

    count: int = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "count", self.key.shape[1])


class InRecordsOfTheirOwn(TrainingSet):
    def select(self, keys, queries):
        fields = [field.name for field in dataclasses.fields(keys)]
        return Counted(**{name: getattr(keys, name) for name in fields})


@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
def test_records_that_users_give(feature_map):
    query, key, value = arrays(7, 21)
    given, plain = (
        ops.attention(query, key, value, Primal(feature_map, "batch_norm", training_set))
        for training_set in (InRecordsOfTheirOwn(), AllKeys())
    )
    assert_close(backends.to_numpy(given), backends.to_numpy(plain), 1e-6)
    assert Counted(key, value).first(5).count == 5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
def test_a_row_that_sees_nothing_in_16_bits(small_blocks, is_causal, dtype):
    """Zero, with gradients that are finite; what hides a key is no infinity in float16."""
    key_mask = np.ones((2, 18), bool)
    key_mask[1], key_mask[0, :3] = False, False

    def loss(*tensors):
        narrow = [keras.ops.cast(x, dtype) for x in tensors]
        output = ops.attention(*narrow, OWN, key_mask=key_mask, is_causal=is_causal)
        return keras.ops.sum(keras.ops.square(keras.ops.cast(output, "float32")))

    for gradient in backends.gradients(loss, arrays(21, 18, batch=2)):
        assert np.isfinite(gradient).all()
        assert not gradient[1].any()


@pytest.mark.parametrize("seed", range(8))
def test_scores_of_own_examples_in_16_bits(small_blocks, seed):
    """Scores of a hundred, which bfloat16 would round by a quarter, are not rounded.

    Keys of one window are equal, lest their mean is rounded.
    """
    query, key, value = arrays(21, batch=2, seed=seed)
    key = np.repeat(key[:, :7], 3, axis=1)
    narrow = [keras.ops.cast(8 * x, "bfloat16") for x in (query, key, value)]
    wide = [keras.ops.cast(x, "float32") for x in narrow]
    exact, found = (
        backends.to_numpy(keras.ops.cast(ops.attention(*x, OWN, is_causal=True), "float32"))
        for x in (wide, narrow)
    )
    assert_close(found, exact, 0.003 * np.abs(exact).max())


@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
def test_flash_attention_is_insisted_on(small_blocks, is_causal):
    """Where there is none, as on a CPU, an error says so, whatever else limits queries."""
    key_mask = np.arange(18)[None] < 15
    options = {"key_mask": key_mask, "is_causal": is_causal, "flash_attention": True}
    with pytest.raises((ImportError, RuntimeError, ValueError), match=r"(?i)flash|cudnn"):
        ops.attention(*arrays(21, 18), "softmax", **options)


def test_the_kernel_is_taken(monkeypatch):
    """On torch, and where the own window of a causal query needs a key of its own too."""
    taken, attend = [], fused.fused_softmax_attention

    def record(query, examples, **options):
        taken.append(examples.own is not None)
        return attend(query, examples, **options)

    monkeypatch.setattr(fused, "fused_softmax_attention", record)
    monkeypatch.setattr(running_means, "are_faster", lambda *arguments: False)
    inputs = arrays(fused.LEAST_WITH_OWN + 1)
    for is_causal in (False, True):
        ops.attention(*inputs, OWN, is_causal=is_causal)
    assert taken == ([False, False, False, True] if backends.BACKEND == "torch" else [])


def test_long_sequences_take_blocks_or_a_kernel(monkeypatch):
    """The choice is made from lengths; a short sequence is not cut up."""
    monkeypatch.setattr(dual, "TIMES_ON_GPU", 1)
    monkeypatch.setattr(native, "runs_on_gpu", lambda: False)
    is_apart = backends.BACKEND != "torch"
    assert dual.dual_form((1, 64, 8, 32), 64) == "whole"
    assert dual.dual_form((1, 4096, 8, 32), 4096) == "blocks"
    assert dual.dual_form((None, None, 8, 32), None) == "blocks"
    # One query after the other, as a decoder asks, whatever there is to see.
    assert dual.dual_form((1, 1, 8, 32), None) == "whole"
    assert dual.dual_form((1, 1, 8, 32), 10**7) == "whole"
    # What fits into one block is not worked again in a backward pass.
    assert dual.dual_form((1, 128, 16, 32), 2047) == "whole"
    assert dual.dual_form((1, 2048, 1, 32), 2048) == ("blocks" if is_apart else "whole")
    assert dual.dual_form((1, 2049, 1, 32), 2048) == "blocks"
    assert dual.dual_form((None, 2048, 1, 32), 2048) == "blocks"
    # Many short sequences together are as much as a long one.
    assert dual.dual_form((32, 197, 3, 64), 197) == "whole"
    assert dual.dual_form((512, 197, 3, 64), 197) == "blocks"
    for num_examples in (1, 64, 4096, 10**6, None):
        size = dual.block_size(1, 8, 10**6, num_examples)
        assert dual.LEAST_BLOCK <= size <= dual.MOST_ROWS // 8
        assert size % dual.ROWS_AT_ONCE == 0
    # A head with many weights takes as many at once, whatever others there are.
    assert dual.takes_heads_apart(512, 512) is is_apart
    assert dual.dual_form((1, 512, 8, 32), 512) == ("blocks" if is_apart else "whole")
    # A loop would be compiled for each call that is not.
    assert dual.dual_form((1, 512, 8, 32), 512, is_eager=True) == "whole"
    assert not dual.takes_heads_apart(512, 511)
    assert not dual.takes_heads_apart(None, 4096)
    assert not dual.takes_heads_apart(4096, None)
    assert dual.block_of_head(4096, 1024) == 1024
    assert dual.block_of_head(4096, 2048) == 512
    assert dual.block_of_head(4096, 2**20) == 64
    # The last block is as full as the others.
    assert dual.block_of_head(1025, 1025) == 520
    assert dual.block_of_head(4096, 3000) == 344
    monkeypatch.setattr(native, "runs_on_gpu", lambda: True)
    assert not dual.takes_heads_apart(4096, 4096)
    # Fewer heads take more queries at once, and more sequences fewer.
    assert dual.block_size(1, 2, 4096, 64) == 4 * dual.block_size(1, 8, 4096, 64)
    assert dual.block_size(64, 8, 4096, 512) < dual.block_size(1, 8, 4096, 512)


@pytest.mark.skipif(backends.BACKEND == "torch", reason="heads are never apart there")
@pytest.mark.parametrize("form", [None, "blocks"])
def test_heads_are_apart_where_a_compiler_sees_them(monkeypatch, form):
    """Run eagerly, JAX would compile the loop over heads at each call."""
    called, map_heads = [], dual.map_heads

    def record(*arguments):
        called.append(True)
        return map_heads(*arguments)

    monkeypatch.setattr(dual, "map_heads", record)
    monkeypatch.setattr(native, "runs_on_gpu", lambda: False)
    query, key, value = (keras.ops.convert_to_tensor(x) for x in arrays(512))

    def attend(query, key, value):
        return ops.attention(query, key, value, "softmax", form=form)

    eager = attend(query, key, value)
    assert not called
    compiled = backends.compiled(attend)(query, key, value)
    assert called
    assert_close(backends.to_numpy(compiled), backends.to_numpy(eager), 1e-5)


@pytest.mark.skipif(backends.BACKEND == "tensorflow", reason="XLA shows no shapes of tensors")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("primal", ["softmax", "batch_norm", "scaled_head", "sliding_window"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
def test_no_tensor_has_all_pairs(monkeypatch, primal, is_causal, dropout):
    """Forward and backward, with padding, dropout and causality, at 2,048 tokens."""
    # Fewer weights at once than a mask of all pairs would have entries.
    monkeypatch.setattr(dual, "MOST_WEIGHTS", 2**21)
    monkeypatch.setattr(dual, "TIMES_ON_GPU", 1)
    inputs, key_mask = arrays(2048, heads=4), np.arange(2048)[None] < 2000

    def loss(*tensors):
        options = {"key_mask": key_mask, "is_causal": is_causal, "dropout": dropout, "seed": 1}
        return keras.ops.sum(ops.attention(*tensors, primal, **options))

    largest = largest_on_torch if backends.BACKEND == "torch" else largest_on_jax
    assert 2048 * 16 <= largest(loss, inputs) < 2048 * 2048


def largest_on_jax(loss, inputs):
    import jax

    return largest_tensor(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*inputs).jaxpr)


def largest_on_torch(loss, inputs):
    """The most entries of any tensor that calls of torch's operations make."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for x in made if isinstance(made, (tuple, list)) else [made]:
                if isinstance(x, torch.Tensor):
                    self.largest = max(self.largest, x.untyped_storage().nbytes() // 4)
            return made

    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    with Recorder() as recorder:
        torch.autograd.grad(loss(*tensors), tensors)
    return recorder.largest


def largest_tensor(jaxpr):
    """The most entries of any tensor that a traced function makes."""
    largest = 0
    for equation in jaxpr.eqns:
        for made in equation.outvars:
            largest = max(largest, math.prod(getattr(made.aval, "shape", ())))
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    largest = max(largest, largest_tensor(inner))
    return largest


@pytest.mark.skipif(backends.BACKEND != "jax", reason="no other backend shows what it compiled")
def test_gradients_of_examples_are_columns(heads_apart):
    """XLA on a CPU takes five times as long for products that are as long as there are examples."""
    import jax

    def loss(*tensors):
        return keras.ops.sum(ops.attention(*tensors, "softmax", form="blocks"))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    compiled = gradients.lower(*arrays(40, 37, depth=6)).compile().as_text()
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", compiled)
    assert {"8,37", "6,37"} <= set(shapes)
    assert "37,6" not in shapes


RATE = 0.3
#: A causal call of it is solved prefix by prefix.
CAUSAL_BY_PREFIX = Primal("elu", "batch_norm")


def attend_with_dropout(inputs, form, seed):
    @backends.jitted
    def attention(*tensors):
        return ops.attention(*tensors, "softmax", form=form, dropout=RATE, seed=seed)

    return backends.to_numpy(attention(*inputs))


def test_no_piece_drops_what_another_does(small_blocks, monkeypatch):
    monkeypatch.setattr(dual, "LEAST_PIECE", 24)
    ones = np.ones((1, 48, 8, 4), "float32")
    options = {"is_causal": True, "form": "blocks", "dropout": RATE, "seed": 3}
    # Each query sees the one key: what differs is what is dropped.
    output = backends.to_numpy(ops.attention(ones, ones[:, :1], ones[:, :1], "softmax", **options))
    # Two pieces, of three blocks.
    assert len(np.unique(output.reshape(6, -1), axis=0)) == 6


def test_no_tensors_are_dropped_alike(monkeypatch):
    """Nor those of own examples, next to the others, and of groups of heads."""
    drop, drawn = keras.random.dropout, []

    def record(x, rate, seed):
        # Torch adds the two numbers up.
        drawn.append(int(backends.to_numpy(seed.next()).sum()))
        return drop(x, rate, seed=seed)

    monkeypatch.setattr(keras.random, "dropout", record)
    primal = Primal(training_set=ScaledHeads((1, 2, 3)))
    options = {"is_causal": True, "form": "whole", "dropout": RATE, "seed": 3}
    ops.attention(*arrays(21, heads=3), primal, **options)
    assert len(set(drawn)) == len(drawn) == 1 + 2 + 2


@pytest.mark.parametrize("form", ["whole", "blocks", "heads apart"])
def test_dropout_of_weights(form, request):
    """Of the stated share, unbiased, of each block anew, and the same for the same seed.

    Of each head and each sequence too.
    """
    form = in_small_blocks(form, request)
    query, key, _ = arrays(64, heads=2, batch=2)
    # With equal weights and one-hot values an output tells which weights were kept.
    inputs = [0 * query, 0 * key, np.broadcast_to(np.eye(64)[None, :, None], (2, 64, 2, 64))]
    inputs[2] = inputs[2].astype("float32")
    weights = attend_with_dropout(inputs, form, seed=3) * 64
    kept = weights > 0.5
    assert abs(1 - kept.mean() - RATE) < 0.02
    assert_close(weights[kept], 1 / (1 - RATE), 1e-4)
    assert_close(weights[~kept], 0, 1e-6)
    rows = kept.reshape(-1, 64)
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert_close(attend_with_dropout(inputs, form, seed=3) * 64, weights, 1e-5)
    assert np.abs(attend_with_dropout(inputs, form, seed=4) * 64 - weights).max() > 1


@pytest.mark.parametrize("primal", [Primal(training_set=ScaledHeads((1, 1))), CAUSAL_BY_PREFIX])
def test_no_head_or_block_drops_what_another_does(primal):
    """Groups of heads, and blocks of queries that are fitted on their own prefixes."""
    ones = np.ones((1, 48, 2, 4), "float32")
    output = backends.to_numpy(
        ops.attention(ones, ones, ones, primal, is_causal=True, dropout=RATE, seed=3)
    )
    assert np.abs(output.mean() - 1) < 0.1
    assert np.abs(output[:, :, 0] - output[:, :, 1]).max() > 0.1
    assert np.abs(output[:, 16:32] - output[:, 32:]).max() > 0.1


@pytest.mark.parametrize("form", ["whole", "blocks", "heads apart"])
@pytest.mark.parametrize("seed", [3, None], ids=["seeded", "unseeded"])
def test_the_gradient_drops_what_the_output_did(form, seed, request):
    """The output is linear in the values: their gradient gives it back."""
    form = in_small_blocks(form, request)
    query, key, value = arrays(24, heads=2)
    if seed is None:
        # As layers have them, drawn anew at each call: the two below are one call.
        seed = keras.random.SeedGenerator()
        state = keras.ops.convert_to_numpy(seed.state).copy()

    def restart():
        keras.utils.set_random_seed(0)
        if isinstance(seed, keras.random.SeedGenerator):
            seed.state.assign(state)

    def loss(value):
        return keras.ops.sum(
            ops.attention(query, key, value, "softmax", form=form, dropout=RATE, seed=seed)[:, -1]
        )

    restart()
    expected = float(backends.to_numpy(loss(keras.ops.convert_to_tensor(value))))
    restart()
    (gradient,) = eager_gradients(loss, value)
    assert_close((gradient * value).sum(), expected, 1e-4)


def eager_gradients(function, array):
    """As `backends.gradients`, the seed's state being no part of a compiled function."""
    if backends.BACKEND == "jax":
        import jax

        with keras.StatelessScope():
            return [np.asarray(jax.grad(function)(array))]
    return backends.gradients(function, [array])


@few_where_compiled("member", MEMBERS, few=[FEW[0], FEW[-1]])
def test_layers_train_with_dropout_in_blocks(small_blocks, member):
    """Under the compiler that `fit` takes, with padding and a causal mask."""
    inputs = keras.Input((None, 12))
    x = keras.layers.Masking()(inputs)
    layer = layers.PrimalDualAttention(4, 6, primal=member.primal, dropout=0.2, seed=1)
    model = keras.Model(inputs, layer(x, x, use_causal_mask=True))
    model.compile("sgd", "mse")
    data = np.random.default_rng(0).normal(size=(2, 37, 12)).astype("float32")
    data[:, 30:] = 0
    history = model.fit(data, data, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.parametrize("reduction", ["mean", "first"])
@few_where_compiled(
    "primal", ["softmax", "batch_norm", "conv1d", "linear"], few=["batch_norm", "conv1d"]
)
def test_means_may_come_before_projections(monkeypatch, primal, reduction):
    """Averages of projected keys are projections of averages, padding and all."""
    monkeypatch.setattr(projections, "are_better_late", lambda weight, sizes: True)
    part = primals.get(primal)
    primal = Primal(part.feature_map, part.transform, ScaledHeads((1, 2, 5), reduction))
    rng = np.random.default_rng(0)
    query, value, key = (rng.normal(size=(2, n, 10)).astype("float32") for n in (9, 23, 23))
    value_mask = rng.random((2, 23)) < 0.7
    value_mask[0, :6] = False
    layer = layers.PrimalDualAttention(
        4, 6, value_dim=5, primal=primal, bias_initializer="glorot_uniform"
    )
    layer.build(query.shape, value.shape)
    assert layer._projects_late([23], False)

    def solve(*arguments):
        return (
            layer(*arguments),
            layer(*arguments, value_mask=value_mask),
            *layer(*arguments, return_attention_scores=True),
        )

    for arguments in ((query, value), (query, value, key)):
        # Functions of their own: one that JAX has compiled it would not look at again.
        first = backends.jitted(lambda *x: solve(*x))(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(type(layer), "_projects_late", lambda *arguments: False)
            second = backends.jitted(lambda *x: solve(*x))(*arguments)
        for one, other in zip(first, second):
            assert_close(backends.to_numpy(one), backends.to_numpy(other), 1e-5)


@pytest.mark.parametrize(
    ("transform", "use_bias", "is_padded", "dtype"),
    [
        (None, True, False, "float32"),
        (None, False, True, "mixed_float16"),
        ("batch_norm", True, True, "mixed_bfloat16"),
        ("conv1d", True, True, "float32"),
    ],
)
def test_sums_may_come_before_projections(monkeypatch, transform, use_bias, is_padded, dtype):
    """States of inputs, projected, are those of values: output, gradients, padding and all."""
    monkeypatch.setattr(projections, "are_better_late", lambda weight, sizes: True)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(2, n, 10)).astype("float32") for n in (19, 40, 40)]
    options = {}
    if is_padded:
        options["value_mask"] = rng.random((2, 40)) < 0.7
        options["value_mask"][1] = False
    layer = layers.PrimalDualAttention(
        4,
        6,
        value_dim=5,
        primal=Primal("elu", transform),
        use_bias=use_bias,
        bias_initializer="glorot_uniform",
        dtype=dtype,
    )
    layer.build(*(x.shape for x in inputs[:2]))
    calls, found = [], []
    make_state = states._state

    def spy(key, key_sum, value, projections):
        calls.append(projections is not None)
        return make_state(key, key_sum, value, projections)

    monkeypatch.setattr(states, "_state", spy)
    for is_late in (True, False):

        def loss(query, value, key):
            output = layer(query, value, key, **options)
            return keras.ops.mean(keras.ops.square(keras.ops.cast(output, "float32")))

        with monkeypatch.context() as patch:
            if not is_late:
                patch.setattr(type(layer), "_projects_late", lambda *arguments: False)
            calls.clear()
            output = layer(*inputs, **options)
            assert calls == [is_late]
            assert keras.backend.standardize_dtype(output.dtype) == layer.compute_dtype
            found.append([backends.to_numpy(output), *backends.gradients(loss, inputs)])
    for one, other in zip(*found):
        assert_close(one, other, 1e-5 if dtype == "float32" else 2e-2)


class UnitValues(Transform):
    """Reads and changes values, which must have been projected then."""

    def __call__(self, queries, examples, weights, shift_invariant):
        largest = keras.ops.max(keras.ops.abs(examples.value), axis=-1, keepdims=True)
        return queries, dataclasses.replace(examples, value=examples.value / largest)


class EvenKeys(TrainingSet):
    """Reads values, likewise."""

    def select(self, keys, queries):
        assert keys.value.shape[3] == 6
        return dataclasses.replace(keys, key=keys.key[:, ::2], value=keys.value[:, ::2])


@pytest.mark.parametrize(
    "primal", [Primal("elu", UnitValues()), Primal("elu", None, EvenKeys())], ids=["T", "S"]
)
def test_members_of_users_get_projected_values(monkeypatch, primal):
    """And `analysis.cost` knows."""
    monkeypatch.setattr(projections, "are_better_late", lambda weight, sizes: True)
    layer = layers.PrimalDualAttention(4, 6, primal=primal, bias_initializer="glorot_uniform")
    x = np.random.default_rng(0).normal(size=(2, 80, 10)).astype("float32")
    layer.build(x.shape, x.shape)
    found = backends.to_numpy(layer(x, x))
    (cost,) = analysis.cost(layer, x.shape).layers
    assert {head.projected_values for head in cost.heads} == {80}
    monkeypatch.setattr(type(layer), "_projects_late", lambda *arguments: False)
    assert_close(found, backends.to_numpy(layer(x, x)), 1e-6)


def test_sums_do_not_come_first_where_they_are_more():
    """On short sequences, and of many features."""
    assert not states.sums_come_first(10, 32, 256, 32)
    assert states.sums_come_first(1000, 32, 256, 32)
    assert states.sums_come_first(None, 32, 256, 32)
    assert not states.sums_come_first(1000, 128, 256, 32)
    assert not states.sums_come_first(None, 128, 256, 32)


def test_projections_are_called_where_they_are_more_than_their_formula():
    """Regularised, quantised, adapted and watched ones keep what is theirs."""
    x = np.random.default_rng(0).normal(size=(2, 9, 16)).astype("float32")
    regularised = layers.ScaledHeadAttention(4, 4, activity_regularizer=keras.regularizers.L2(0.1))
    regularised(x, x)
    assert len(regularised.losses) >= 4

    for cls in (layers.PrimalDualAttention, layers.ScaledHeadAttention):
        adapted = cls(4, 4)
        plain = backends.to_numpy(adapted(x, x))
        for dense in (adapted.query_dense, adapted.key_dense, adapted.value_dense):
            dense.enable_lora(2)
            dense.lora_kernel_b.assign(0.3 * np.ones(dense.lora_kernel_b.shape, "float32"))
        changed = backends.to_numpy(adapted(x, x))
        assert np.abs(changed - plain).max() > 1e-2
        quantised = cls(4, 4)
        plain = backends.to_numpy(quantised(x, x))
        for dense in (quantised.key_dense, quantised.value_dense):
            dense.quantize("int8")
        error = np.abs(backends.to_numpy(quantised(x, x)) - plain).max()
        assert 0 < error < 0.1


@pytest.mark.skipif(backends.BACKEND != "torch", reason="hooks are torch's")
def test_hooks_of_projections_are_called():
    x = np.random.default_rng(0).normal(size=(2, 9, 16)).astype("float32")
    for layer in (layers.PrimalDualAttention(4, 4), layers.ScaledHeadAttention(4, 4)):
        plain, seen = backends.to_numpy(layer(x, x)), []
        hook = layer.key_dense.register_forward_hook(lambda *args, seen=seen: seen.append(True))
        assert_close(backends.to_numpy(layer(x, x)), plain, 1e-5)
        assert seen
        hook.remove()


@pytest.mark.parametrize("primal", ["softmax", "batch_norm", "scaled_head", "sliding_window"])
def test_one_trace_for_each_shape(primal):
    """D4: twenty calls of two lengths trace twice; torch has one graph for all lengths."""
    layer = layers.PrimalDualAttention(4, 4, primal=primal)
    layer.build((None, None, 16), (None, None, 16))

    def call(x, mask):
        return layer(x, x, query_mask=mask, value_mask=mask, use_causal_mask=True)

    def inputs(length):
        x = np.random.default_rng(0).normal(size=(2, length, 16)).astype("float32")
        return [keras.ops.convert_to_tensor(one) for one in (x, np.arange(length) < [[66], [39]])]

    if backends.BACKEND == "torch":
        import torch
        from torch._dynamo.testing import CompileCounter

        # Keras sets things up when it is called first.
        call(*inputs(70))
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
        # Lengths that take one form.
        for length in (70, 82, 75):
            compiled(*inputs(length))
        assert counter.frame_count == 1
        return
    traced = []
    compiled = backends.compiled(lambda *tensors: traced.append(True) or call(*tensors))
    for length in [40, 72] * 10:
        compiled(*inputs(length))
    assert len(traced) <= 2


@keras.saving.register_keras_serializable(package="test_blocks")
class Padded(keras.layers.Layer):
    """Attention whose padding is a constant of the layer, not an argument of its call."""

    def __init__(self, form, **kwargs):
        super().__init__(**kwargs)
        self.form = form
        self.mask = keras.ops.convert_to_tensor(np.arange(9)[None] < 7)
        self.dense = keras.layers.EinsumDense("btc,chd->bthd", (None, 2, 3))

    def call(self, x):
        x = self.dense(x)
        return ops.attention(x, x, x, "batch_norm", key_mask=self.mask, form=self.form)


def test_a_mask_that_is_a_constant_trains_in_a_compiled_step():
    x = np.random.default_rng(0).normal(size=(1, 9, 4)).astype("float32")
    weights = []
    for form in ("whole", "blocks"):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([Padded(form)])
        model.compile("sgd", "mse")
        model.fit(x, np.ones((1, 9, 2, 3)), verbose=0)
        weights.append(model.get_weights()[0])
    np.testing.assert_allclose(*weights, rtol=0, atol=1e-6)
