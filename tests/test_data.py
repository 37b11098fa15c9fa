"""Corpora: what ships with the package, splits, baselines, and files that are missing, empty or damaged."""

import lzma
import math

import numpy as np
import pytest

from xlstm_jax.data import baselines, corpora


@pytest.fixture(scope="module")
def kjv():
    return corpora.load("bundled:kjv")


def test_the_bundled_bible(kjv):
    assert kjv.dtype == np.uint8 and kjv.size == 4_137_850
    assert kjv.tobytes().startswith(b"In the beginning God created the heaven and the earth.\n")
    assert corpora.content_hash(kjv) == corpora.BUNDLED["kjv"].sha256


def test_splits_are_contiguous_and_cover_the_text(kjv):
    parts = [corpora.part(kjv, split) for split in ("train", "valid", "test")]
    assert [part.size for part in parts] == [3_724_065, 206_892, 206_893]
    np.testing.assert_array_equal(np.concatenate(parts), kjv)


@pytest.mark.parametrize("suffix", ["txt", "xz"])
def test_a_file_is_a_corpus(tmp_path, suffix):
    path, content = tmp_path / f"text.{suffix}", bytes(range(256))
    path.write_bytes(lzma.compress(content) if suffix == "xz" else content)
    assert corpora.load(f"file:{path}").tobytes() == content


def test_order0_bits():
    train, test = np.array([0] * 300 + [1] * 44, np.uint8), np.array([0, 2], np.uint8)
    assert baselines.order0_bits(train, test) == pytest.approx(-(math.log2(301 / 600) + math.log2(1 / 600)) / 2)


def test_the_bible_under_order0_and_xz(kjv):
    train, test = corpora.part(kjv, "train"), corpora.part(kjv, "test")
    assert baselines.order0_bits(train, test) == pytest.approx(4.340, abs=1e-3)
    few = baselines.xz_bits(train[-100_000:], test[:20_000])  # the whole (1.93) takes several seconds
    assert 2.2 < few < 3.2
    assert baselines.xz_bits(train[:20_000], train[:10_000]) < 0.1  # seen before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot read corpus file .*none.txt: No such file"),
        ("empty.txt", b"", "empty.txt is empty"),
        ("empty.xz", lzma.compress(b""), "empty.xz is empty"),
        ("cut.xz", lzma.compress(bytes(999))[:-9], "cut.xz is truncated or no xz file"),
        ("plain.xz", b"In the beginning", "plain.xz is truncated or no xz file"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        corpora.load(f"file:{tmp_path / name}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["kjv", "bundled:esv", "file:", ""])
def test_an_unknown_corpus_names_the_known_ones(name):
    with pytest.raises(ValueError, match="choose bundled:kjv, or file:PATH"):
        corpora.load(name)


def test_a_damaged_bundled_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "kjv.txt.xz"
    path.write_bytes(lzma.compress(b"In the beginning"))
    monkeypatch.setitem(corpora.BUNDLED, "kjv", corpora.BUNDLED["kjv"]._replace(path=path))
    with pytest.raises(ValueError, match="kjv.txt.xz is damaged: expected 4137850 bytes"):
        corpora.load("bundled:kjv")
