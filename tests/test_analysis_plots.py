"""Plots: what is drawn is what was given, and says so; nothing global is touched."""

import io
import sys

import keras
import numpy as np
import pytest

from keras_pdattn import analysis

matplotlib = pytest.importorskip("matplotlib")

RNG = np.random.default_rng(0)
SCORES = RNG.random((2, 5, 6, 6)).astype("float32")
MASK = np.arange(6) < np.array([[6], [4]])
WORDS = ["one", "two", "three", "four", "five", "six"]
COEFFICIENTS = RNG.normal(size=(2, 3, 6, 4))
COEFFICIENTS[0, 0, [1, 4]] = 0
COEFFICIENTS[0, 1, 2] *= 1e-6


def images(figure):
    return [axis.images[0] for axis in figure.axes if axis.images]


def data(figure):
    return [np.asarray(image.get_array()) for image in images(figure)]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def draw(figure):
    """Lays the figure out as saving does, where clashes of its parts show as warnings."""
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    return figure


@pytest.fixture(autouse=True)
def nothing_global():
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("heads", [1, 2, 5, 12])
@pytest.mark.parametrize("length", [1, 5, 200])
def test_attention_of_any_size(heads, length):
    scores = RNG.random((1, heads, length, length))
    figure = draw(analysis.plot_attention(scores, title="Softmax"))
    assert len(figure.axes) == heads + 1  # With the bar of colours.
    np.testing.assert_array_equal(data(figure), scores[0])
    assert [axis.get_title() for axis in figure.axes[:-1]] == [f"head {h}" for h in range(heads)]
    assert len({image.get_clim() for image in images(figure)}) == 1
    assert images(figure)[0].get_clim() == (0, scores.max())
    assert figure.get_suptitle() == "Softmax"
    assert figure.axes[-1].get_ylabel() == "attention score"


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("length", [30, 200, 2000])
def test_ticks_have_room_beside_the_name_of_their_axis(heads, length):
    figure = analysis.plot_attention(np.ones((1, heads, length, length), "float32"))
    figure.draw_without_rendering()
    (name,) = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() == "query"]
    right = name.get_window_extent().x1
    assert all(x.get_window_extent().x0 > right + 2 for x in figure.axes[0].get_yticklabels())


def test_attention_of_some_heads_without_padding():
    scores = keras.ops.convert_to_tensor(SCORES)
    figure = draw(analysis.plot_attention(scores, sequence=1, heads=[3, 0], mask=MASK))
    np.testing.assert_array_equal(data(figure), SCORES[1, [3, 0], :4, :4])
    assert [axis.get_title() for axis in figure.axes[:-1]] == ["head 3", "head 0"]
    (only,) = data(analysis.plot_attention(scores, heads=2))
    np.testing.assert_array_equal(only, SCORES[0, 2])


def test_attention_keeps_the_numbers_and_names_of_positions():
    mask = np.array([[False, True, True, False, True, True]] * 2)
    figure = draw(analysis.plot_attention(SCORES, mask=mask, heads=[0, 1]))
    left, right, _ = figure.axes
    assert ticks(left.xaxis) == ticks(left.yaxis) == ticks(right.xaxis) == ["1", "2", "4", "5"]
    assert not any(ticks(right.yaxis))
    figure = draw(analysis.plot_attention(SCORES, mask=mask, labels=WORDS, heads=[0]))
    assert ticks(figure.axes[0].xaxis) == ticks(figure.axes[0].yaxis)
    assert ticks(figure.axes[0].xaxis) == ["two", "three", "five", "six"]


def test_cross_attention_has_labels_and_masks_of_its_own():
    figure = analysis.plot_attention(
        SCORES[..., :3],
        heads=[0],
        labels=WORDS,
        key_mask=np.array([[True, False, True]] * 2),
        key_labels=["a", "b", "c"],
    )
    np.testing.assert_array_equal(data(figure), SCORES[0, :1, :, [0, 2]].transpose(1, 2, 0))
    assert ticks(figure.axes[0].xaxis) == ["a", "c"]
    assert ticks(figure.axes[0].yaxis) == WORDS


def test_attention_over_grids_is_flattened():
    figure = analysis.plot_attention(SCORES.reshape(2, 5, 2, 3, 2, 3), mask=MASK.reshape(2, 2, 3))
    np.testing.assert_array_equal(data(figure), SCORES[0])


@pytest.mark.filterwarnings("error::UserWarning")
def test_many_labels_are_thinned_out():
    names = [f"w{i}" for i in range(200)]
    figure = draw(analysis.plot_attention(RNG.random((1, 4, 200, 200)), labels=names))
    shown = ticks(figure.axes[0].yaxis)
    assert 10 <= len(shown) <= 20 and shown[:2] == ["w0", names[200 // len(shown) + 1]]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("measure", ["distance", "cosine_similarity", "cka"])
def test_redundancy(measure):
    redundancy = analysis.head_redundancy(SCORES)
    figure = draw(analysis.plot_redundancy(redundancy, measure=measure))
    attribute = {"distance": "distances", "cosine_similarity": "cosine_similarities"}
    matrix = getattr(redundancy, attribute.get(measure, "ckas"))
    np.testing.assert_array_equal(data(figure), [matrix])
    assert [text.get_text() for text in figure.axes[0].texts] == [f"{x:.2f}" for x in matrix.flat]
    assert figure.axes[0].get_title() == f"mean {getattr(redundancy, measure):.3f}"


@pytest.mark.filterwarnings("error::UserWarning")
def test_redundancy_of_several_members():
    """On one scale; numbers would not fit into the cells of 20 heads."""
    members = {
        "softmax": analysis.head_redundancy(RNG.random((1, 20, 4, 4))),
        "Attention-BN": analysis.head_redundancy(RNG.random((1, 20, 4, 4)) ** 3),
    }
    figure = draw(analysis.plot_redundancy(members, title="Redundancy"))
    np.testing.assert_array_equal(data(figure), [x.distances for x in members.values()])
    assert [axis.get_title().split("\n")[0] for axis in figure.axes[:2]] == list(members)
    largest = max(x.distances.max() for x in members.values())
    assert [image.get_clim() for image in images(figure)] == [(0, largest)] * 2
    assert not figure.axes[0].texts


@pytest.mark.filterwarnings("error::UserWarning")
def test_support_vectors_of_a_sequence():
    figure = draw(analysis.plot_support_vectors(COEFFICIENTS, mask=MASK, title="Dual"))
    norms = np.linalg.norm(COEFFICIENTS[0], axis=-1)
    assert len(figure.axes) == 3
    chosen = [[0, 2, 3, 5], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    for axis, keys, norm in zip(figure.axes, chosen, norms):
        supports, others = axis.lines
        np.testing.assert_array_equal(supports.get_xdata(), keys)
        np.testing.assert_allclose(supports.get_ydata(), norm[keys])
        np.testing.assert_array_equal(others.get_xdata(), np.setdiff1d(range(6), keys))
        assert len(axis.collections[0].get_segments()) == len(keys)
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "head 0: 4 of 6 keys",
        "head 1: 5 of 6 keys",
        "head 2: 6 of 6 keys",
    ]


def test_support_vectors_without_padding_and_by_tolerance():
    """Padding is no key, however large its coefficients; the tolerance is each head's own."""
    coefficients = COEFFICIENTS.copy()
    coefficients[1, :, 4:] = 1e6
    coefficients[1, 1] *= 1e-3
    options = {"sequence": 1, "mask": MASK, "heads": [1, 2], "tolerance": 0.5}
    figure = analysis.plot_support_vectors(keras.ops.convert_to_tensor(coefficients), **options)
    for head, axis in zip((1, 2), figure.axes):
        norms = np.linalg.norm(coefficients[1, head, :4], axis=-1)
        (keys,) = np.nonzero(norms > norms.max() / 2)
        np.testing.assert_array_equal(axis.lines[0].get_xdata(), keys)
        drawn = np.concatenate([line.get_xdata() for line in axis.lines])
        assert sorted(drawn) == [0, 1, 2, 3]


@pytest.mark.filterwarnings("error::UserWarning")
def test_support_vectors_of_a_grid():
    figure = draw(analysis.plot_support_vectors(COEFFICIENTS, grid=(2, 3), mask=MASK[::-1]))
    norms = np.linalg.norm(COEFFICIENTS[0], axis=-1)
    masked = [[1, 4, 5], [2, 4, 5], [4, 5]]
    assert len(figure.axes) == 4
    for image, norm, hidden in zip(images(figure), norms, masked):
        drawn = image.get_array().ravel()
        np.testing.assert_array_equal(np.nonzero(np.ma.getmaskarray(drawn))[0], hidden)
        np.testing.assert_allclose(drawn.compressed(), np.delete(norm, hidden))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_a_head_without_support_vectors(grid):
    coefficients = np.zeros((1, 2, 6, 3))
    figure = draw(analysis.plot_support_vectors(coefficients, grid=grid))
    titles = [figure.axes[0].get_title(loc=loc) for loc in ("left", "center")]
    assert "head 0: 0 of 6 keys" in titles


@pytest.mark.filterwarnings("error::UserWarning")
def test_cost():
    lengths = [128, 256, 512]
    costs = {"linear": [1e4, 2e4, 4e4], "softmax": [1e5, 4e5, 16e5]}
    memory = {"softmax": [1e6, 4e6, None], "other": [1.0, 2.0, 3.0]}
    figure = draw(analysis.plot_cost(lengths, costs, memory=memory, cost_label="FLOPs"))
    first, second = figure.axes
    for axis, series in ((first, costs), (second, memory)):
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        assert [line.get_label() for line in axis.lines] == list(series)
        for line, values in zip(axis.lines, series.values()):
            np.testing.assert_array_equal(line.get_xdata(), lengths)
            np.testing.assert_array_equal(line.get_ydata(), np.array(values, float))
    assert (first.get_ylabel(), second.get_ylabel()) == ("FLOPs", "memory in bytes")
    assert first.lines[1].get_color() == second.lines[0].get_color() != first.lines[0].get_color()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(names) == {"linear", "softmax", "other"}
    assert names.index("softmax") < names.index("linear")  # As the lines end.
    assert len(analysis.plot_cost(lengths, costs).axes) == 1


@pytest.mark.parametrize(
    "plot",
    [
        lambda: analysis.plot_attention(SCORES),
        lambda: analysis.plot_redundancy(analysis.head_redundancy(SCORES)),
        lambda: analysis.plot_support_vectors(COEFFICIENTS),
        lambda: analysis.plot_cost([1, 2], {"a": [1, 2]}),
    ],
)
def test_without_matplotlib(plot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "keras-pdattn\[plot\]"'):
        plot()


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (lambda: analysis.plot_attention(SCORES[0]), "`scores` must have the shape"),
        (lambda: analysis.plot_attention(SCORES, sequence=2), "less than 2. Received: sequence=2"),
        (lambda: analysis.plot_attention(SCORES, heads=[5]), "less than 5. Received: heads=5"),
        (lambda: analysis.plot_attention(SCORES, heads=[]), r"Received: heads=\[\]"),
        (lambda: analysis.plot_attention(SCORES, heads=[0.5]), "Received: heads=0.5"),
        (lambda: analysis.plot_attention(SCORES, labels=["a"]), "Received: labels of length 1"),
        (lambda: analysis.plot_attention(SCORES, mask=MASK[:, :3]), r"`mask`.*\(2, 3\)"),
        (lambda: analysis.plot_attention(SCORES, mask=~MASK), "leave something to plot"),
        (lambda: analysis.plot_attention(SCORES, key_mask=MASK[:1]), r"`key_mask`.*\(1, 6\)"),
        (lambda: analysis.plot_redundancy(SCORES), "must be a `HeadRedundancy`"),
        (lambda: analysis.plot_redundancy({}), "Received: redundancy={}"),
        (
            lambda: analysis.plot_redundancy(analysis.head_redundancy(SCORES), measure="angle"),
            "`measure` must be one of.*Received: measure='angle'",
        ),
        (lambda: analysis.plot_support_vectors(SCORES[0]), "`coefficients` must have the shape"),
        (lambda: analysis.plot_support_vectors(SCORES.astype(int)), "must be floating point"),
        (lambda: analysis.plot_support_vectors(SCORES, grid=(2, 2)), r"Received: grid=\(2, 2\)"),
        (lambda: analysis.plot_support_vectors(SCORES, grid=(-2, -3)), "Received: grid=-2"),
        (lambda: analysis.plot_support_vectors(SCORES, grid=6), "Received: grid=6"),
        (lambda: analysis.plot_support_vectors(SCORES, tolerance=1), "Received: tolerance=1"),
        (lambda: analysis.plot_cost([], {"a": []}), r"`lengths`.*Received: lengths=\[\]"),
        (lambda: analysis.plot_cost([1, 2], {}), "Received: costs={}"),
        (lambda: analysis.plot_cost([1, 2], {"a": [1]}), "Received: 1 for 'a'"),
        (lambda: analysis.plot_cost([1, 2], {"a": [1, 0]}), r"Received: costs\['a'\]=\[1, 0\]"),
        (lambda: analysis.plot_cost([1], {"a": [1]}, memory={"a": [-1]}), r"memory\['a'\]"),
    ],
)
def test_errors(plot, message):
    with pytest.raises(ValueError, match=message):
        plot()
