"""Which images are duplicates, and which to keep: against all pairs, and on a cluster."""

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_imgread import find_duplicates, read_metadata, run_job, write_shards
from dask_imgread.testing import draw_picture, encode_picture, make_shards, write_shard

A, B, C = (encode_picture(draw_picture(n, (24, 16)), "png") for n in range(3))


def make_rows(images):
    """Return rows of images, each given as a dict of what is not the same for all."""
    defaults = {"sha256": None, "phash": None, "width": 10, "height": 10, "rating": None}
    images = [defaults | image for image in images]
    columns = {name: [image[name] for image in images] for name in defaults}
    ids = [image.get("id", f"s-1/{n:02}.jpg") for n, image in enumerate(images)]
    places = [image.get("offset", n * 1024) for n, image in enumerate(images)]
    rows = pd.DataFrame(
        {
            "shard": "s.tar",
            "offset": pd.array(places, "int64[pyarrow]"),
            "size": 100,
            "sha256": pd.array(columns.pop("sha256"), "string[pyarrow]"),
            "phash": pd.array(columns.pop("phash"), "uint64[pyarrow]"),
            **{name: pd.array(values, "int32[pyarrow]") for name, values in columns.items()},
        },
        index=pd.Index(ids, dtype="string[pyarrow]", name="image_id"),
    )
    return rows.drop(columns="rating") if rows["rating"].isna().all() else rows


def sum_up(found):
    """Return, of each image, its group, whether it is kept, and its distance."""
    names = [name.rpartition("/")[2][:2] for name in found.index]
    groups = [name.rpartition("/")[2][:2] for name in found["group"]]
    rows = zip(names, groups, found["keep"].tolist(), found["distance"].tolist(), strict=True)
    return [" ".join(map(str, row)).replace("True", "kept").replace("False", "-") for row in rows]


def assert_same(lazy, found):
    computed = lazy.compute(scheduler="sync")
    assert computed.dtypes.equals(lazy.dtypes)
    computed = computed.sort_values(["group", "keep"], ascending=[True, False], kind="stable")
    pd.testing.assert_frame_equal(computed.sort_index(), found.sort_index())


def test_equal_bytes():
    rows = make_rows([{"sha256": digest} for digest in ("aa", "bb", "AA", None, None, "cc")])
    assert sum_up(find_duplicates(rows)) == ["00 00 kept 0", "02 00 - 0"]
    assert find_duplicates(rows)["sha256"].tolist() == ["aa", "AA"]
    assert list(find_duplicates(rows)) == [
        *("group", "keep", "distance", "shard", "offset", "size", "width", "height", "sha256")
    ]


def test_near_hashes_are_linked():
    hashes = [0, 0b1111, 0b1111_1111, 1 << 63 | 0xFFFF_F000, None, 0b1111]
    rows = make_rows([{"phash": value} for value in hashes])
    near = ["00 00 kept 0", "01 00 - 4", "02 00 - 8", "05 00 - 4"]
    assert sum_up(find_duplicates(rows, "phash")) == near
    assert sum_up(find_duplicates(rows, "phash", distance=3)) == ["01 01 kept 0", "05 01 - 0"]
    assert sum_up(find_duplicates(rows, "phash", distance=0)) == ["01 01 kept 0", "05 01 - 0"]
    for kind in ("Int64", "int64[pyarrow]", "UInt64"):  # of 64 bits, some with a sign
        signed = rows.drop(rows.index[3]).astype({"phash": kind})
        assert sum_up(find_duplicates(signed, "phash")) == near
    signed = make_rows([{}, {}]).assign(phash=np.array([-1, -2]))
    assert find_duplicates(signed, "phash")["phash"].tolist() == [(1 << 64) - 1, (1 << 64) - 2]


def test_hashes_that_floats_confuse():
    """Next to each other as numbers, and equal as floats, two hashes may differ in many bits."""
    value = 0xF000_0000_0000_0400
    rows = make_rows([{"phash": value}, {"phash": value - 1}, {"phash": value}])
    found = find_duplicates(rows, "phash")
    assert sum_up(found) == ["00 00 kept 0", "02 00 - 0"]
    assert_same(find_duplicates(dd.from_pandas(rows, 2), "phash"), found)


def test_which_one_is_kept():
    rows = make_rows(
        [
            {"sha256": "a", "rating": 1},
            {"sha256": "a", "width": 20, "rating": None},
            {"sha256": "a", "width": 20, "rating": 3},
            {"sha256": "a", "width": None, "height": 99, "rating": 3},
        ]
    )
    assert sum_up(find_duplicates(rows)) == [f"{n:02} 00 {k} 0" for n, k in kept(1, 2, 0, 3)]
    preferred = find_duplicates(rows, prefer="rating")
    assert sum_up(preferred) == [f"{n:02} 00 {k} 0" for n, k in kept(2, 3, 0, 1)]
    assert preferred["rating"].tolist()[:3] == [3, 3, 1]
    bare = rows.drop(columns=["width", "height", "rating"])
    assert sum_up(find_duplicates(bare)) == [f"{n:02} 00 {k} 0" for n, k in kept(0, 1, 2, 3)]


def kept(first, *others):
    return [(first, "kept"), *((other, "-") for other in others)]


def test_links_count_as_one_image():
    link = {"sha256": "a", "offset": 512}
    assert len(find_duplicates(make_rows([link, link, {"sha256": "b"}]))) == 0
    rows = make_rows([link, link, {"sha256": "a"}])
    assert sum_up(find_duplicates(rows)) == ["00 00 kept 0", "01 00 kept 0", "02 00 - 0"]
    larger = make_rows([link, link, {"sha256": "a", "width": 99}])
    assert sum_up(find_duplicates(larger)) == ["02 00 kept 0", "00 00 - 0", "01 00 - 0"]


def test_ids_that_are_not_unique():
    same = {"sha256": "a", "id": "s-1/00.jpg"}
    twice = [same | {"offset": 512}] * 2
    assert len(find_duplicates(make_rows(twice))) == 0  # the same row, as of two jobs' outputs
    rows = make_rows([*twice, {"sha256": "a"}])
    assert sum_up(find_duplicates(rows)) == ["00 00 kept 0", "00 00 kept 0", "02 00 - 0"]
    rows = make_rows([same, same])
    for frame in (rows, dd.from_pandas(rows, 1, sort=False)):
        with pytest.raises(ValueError, match=r"s-1/00.jpg is the image_id of several duplicates"):
            len(find_duplicates(frame))


def test_blank_images():
    rows = make_rows([{"phash": 0, "sha256": "a"}] * 3)
    rows["blank"] = pd.array([True, True, None], "bool[pyarrow]")
    assert len(find_duplicates(rows, "phash")) == 0
    assert len(find_duplicates(rows, "phash", blank=True)) == 3
    assert len(find_duplicates(rows)) == 3


def test_many_of_one_group(monkeypatch):
    monkeypatch.setattr("dask_imgread.duplicates._MANY", 2)
    rows = make_rows([{"phash": 255, "sha256": "ab"}] * 3)
    with pytest.warns(UserWarning, match=r"3 images are one .*by phash: .*00\.jpg, 0{14}ff$"):
        find_duplicates(rows, "phash")
    with pytest.warns(UserWarning, match=r"3 images are one .*by sha256: .*, ab$"):
        find_duplicates(rows)


def test_what_can_not_be_compared():
    rows = make_rows([{"phash": 0}])
    for frame in (rows, dd.from_pandas(rows, 1)):
        with pytest.raises(ValueError, match=r"no column dhash: make .* the function fingerprint"):
            find_duplicates(frame, "dhash")
        with pytest.raises(ValueError, match=r"no column sha256: .*checksum=True"):
            find_duplicates(frame.drop(columns="sha256"))
        with pytest.raises(ValueError, match="no column rating, by which to prefer"):
            find_duplicates(frame, "phash", prefer="rating")
        with pytest.raises(ValueError, match="phash has floats, which don't hold 64 bits"):
            find_duplicates(frame.astype({"phash": float}), "phash")
        for distance in (-1, 17):
            with pytest.raises(ValueError, match=f"distance is {distance}, and must be 0 to 16"):
                find_duplicates(frame, "phash", distance=distance)
    with pytest.raises(ValueError, match="by image_id, and the frame has none"):
        find_duplicates(rows.reset_index(drop=True).assign(key="a"), "phash")
    with pytest.raises(ValueError, match="expected, or a job's folder, not nowhere"):
        find_duplicates("nowhere")


# Compared with all pairs in plain Python

IMAGES = st.lists(
    st.fixed_dictionaries(
        {
            "sha256": st.sampled_from([None, "a", "b"]),
            "phash": st.sampled_from([None, 0, 1, 3, 7, 255, 1 << 63, (1 << 64) - 1]),
            "width": st.sampled_from([None, 1, 2]),
            "rating": st.sampled_from([None, 1, 2]),
        }
    ),
    max_size=12,
)


def find_plainly(images, by, distance, prefer):
    """Return, by number, the group of each image that has duplicates, and the one to keep."""

    def alike(one, other):
        if None in (one[by], other[by]):
            return False
        if by == "sha256":
            return one[by] == other[by]
        return (one[by] ^ other[by]).bit_count() <= distance

    groups = [{number} for number in range(len(images))]
    for one, image in enumerate(images):
        for other in range(one):
            if alike(image, images[other]) and groups[one] is not groups[other]:
                groups[one] |= groups[other]
                for number in groups[one]:
                    groups[number] = groups[one]

    def rank(number):
        image = images[number]
        pixels = -10 * (image["width"] or 0)
        return (-(image["rating"] or 0) if prefer else 0), pixels, number

    return {
        number: (min(group), min(group, key=rank))
        for number, group in enumerate(groups)
        if len(group) > 1
    }


HOW = {
    "by": st.sampled_from(["sha256", "phash"]),
    "distance": st.sampled_from([0, 1, 4, 16]),
    "prefer": st.booleans(),
}


def find_both(images, by, distance, prefer):
    rows = make_rows(images)
    prefer = "rating" if prefer and "rating" in rows else None
    return rows, {"by": by, "distance": distance, "prefer": prefer}


@settings(max_examples=150, deadline=None)
@given(images=IMAGES, **HOW)
def test_as_in_plain_python(images, by, distance, prefer):
    rows, how = find_both(images, by, distance, prefer)
    found = find_duplicates(rows, **how)
    numbers = {name: number for number, name in enumerate(rows.index)}
    wanted = find_plainly(images, by, distance, how["prefer"])
    assert {
        numbers[name]: (numbers[group], keep)
        for name, group, keep in found[["group", "keep"]].itertuples()
    } == {number: (group, number == best) for number, (group, best) in wanted.items()}
    for name, bits in found["distance"].items():
        if by == "phash":
            best = images[wanted[numbers[name]][1]]["phash"]
            assert bits == (best ^ images[numbers[name]]["phash"]).bit_count()


@settings(max_examples=15, deadline=None)
@given(
    images=IMAGES,
    partitions=st.integers(1, 4),
    random=st.randoms(use_true_random=False),
    **HOW,
)
def test_dask_and_pandas_agree(images, partitions, random, by, distance, prefer):
    rows, how = find_both(images, by, distance, prefer)
    order = list(range(len(rows)))
    random.shuffle(order)
    lazy = dd.from_pandas(rows.iloc[order], npartitions=partitions, sort=False)
    assert_same(find_duplicates(lazy, **how), find_duplicates(rows, **how))


def test_planted_copies_on_a_cluster(client):
    rng = np.random.default_rng(3)
    hashes = rng.integers(0, 1 << 64, 3_000, np.uint64)
    hashes[1_000:2_000] = hashes[:1_000] ^ np.uint64(0b1011)
    hashes[::20] = 0  # hot
    rows = make_rows([{"phash": value} for value in hashes.tolist()])
    found = find_duplicates(rows, "phash")
    assert found["group"].nunique() == 1_000 - 50 + 1
    computed = find_duplicates(dd.from_pandas(rows, 5), "phash").compute()
    pd.testing.assert_frame_equal(computed.sort_index(), found.sort_index())
    rest = rows.drop(found.index[~found["keep"]])
    assert len(find_duplicates(rest, "phash")) == 0


def test_more_alike_than_are_compared(monkeypatch):
    """What is not found does not depend on partitions either."""
    monkeypatch.setattr("dask_imgread.hamming._LEVELS", 1)
    rng = np.random.default_rng(3)
    for name, value in {"_WINDOW": 3, "_FEW": 1}.items():
        monkeypatch.setattr(f"dask_imgread.hamming.{name}", value)
    rows = make_rows([{"phash": value} for value in rng.integers(0, 1 << 14, 500).tolist()])
    with pytest.warns(UserWarning, match="different hashes are much alike"):
        found = find_duplicates(rows, "phash", distance=1)
    lazy = find_duplicates(dd.from_pandas(rows, 7), "phash", distance=1)
    with pytest.warns(UserWarning, match="different hashes are much alike"):
        computed = lazy.compute(scheduler="sync")
    pd.testing.assert_frame_equal(computed.sort_index(), found.sort_index())
    exact = find_duplicates(rows, "phash", distance=0)
    assert len(exact) < len(found)


def hash_pixels(batch):
    """Return the mean colour of each image as a hash of few bits."""
    means = [int(image.image_data.mean()) for image in batch]
    return {
        "image_id": batch.ids,
        "shard": [image.shard for image in batch],
        "offset": [image.offset for image in batch],
        "size": [image.size for image in batch],
        "phash": np.array(means, np.uint64),
    }


def test_from_a_jobs_folder_to_shards(tmp_path, client):
    shards = [
        write_shard(tmp_path / f"{name}.tar", [*images.items()])
        for name, images in {
            "s": {"a.png": A, "b.png": B},
            "t": {"c.png": A, "d.png": C, "e.png": A},
        }.items()
    ]
    run_job(shards, str(tmp_path / "out"), client=client, checksum=True)
    found = find_duplicates(tmp_path / "out").compute()
    assert [name[-5:] for name in sorted(found.index)] == ["a.png", "c.png", "e.png"]
    assert found["keep"].sum() == 1
    rows = read_metadata(shards).compute()
    rest = rows.drop(found.index[~found["keep"]])
    written = write_shards(rest, str(tmp_path / "unique"), client=client).compute()
    assert len(written) == 3
    some = write_shards(found[found["keep"]], str(tmp_path / "kept"), client=client).compute()
    assert some["size"].tolist() == [len(A)]


def test_hashes_of_a_jobs_function(tmp_path, client):
    shards = make_shards(tmp_path / "shards", shards=2, images_per_shard=3)
    shards += make_shards(tmp_path / "copies", shards=2, images_per_shard=3)
    run_job(shards, str(tmp_path / "out"), hash_pixels, client=client)
    found = find_duplicates(tmp_path / "out", "phash", distance=0).compute()
    assert len(found) == 12
    assert found["keep"].sum() <= 6
