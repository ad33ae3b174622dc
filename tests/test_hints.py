"""What errors say of names and values that are near."""

import inspect
import re

import pytest

import dask_imgread
from dask_imgread import ImageReaderStage, read_bag, verify_shards


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"batch_size": 4}, "; did you mean 'dali_batch_size'?"),
        ({"threads": 4}, "; did you mean 'num_threads'?"),
        ({"interpolation": "bicubic"}, "; did you mean 'resample'?"),
        ({"num_workers": 4}, "start_cluster(n_workers=...)"),
        ({"shuffle": True}, "write_shards(..., shuffle=SEED)"),
        ({"storage_options": {}}, "partition_shards(paths, storage_options=...)"),
        ({"nonsense": 1}, "'nonsense'"),
    ],
)
def test_a_wrong_option_of_the_reader(options, hint):
    for make in (ImageReaderStage, ImageReaderStage().with_options):
        with pytest.raises(TypeError, match=f"{re.escape(hint)}"):
            make(**options)
    (name,) = options
    for read in (read_bag, verify_shards) if name != "storage_options" else ():
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            read("a.tar", **options)


@pytest.mark.parametrize("name", ["process", "digests", "resources"])
def test_a_method_is_no_option(name):
    with pytest.raises(TypeError, match=f"has no option '{name}'"):
        ImageReaderStage().with_options(**{name: 1})


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"device": "cuda"}, "'gpu'"),
        ({"on_error": "skipped"}, "'skip'"),
        ({"resize": 8, "resample": "linear"}, "'bilinear'"),
        ({"resize": 8, "resample": "lanczos3"}, "'lanczos'"),
        ({"resize": 8, "fit": "center"}, "'crop'"),
    ],
)
def test_a_wrong_value(options, hint):
    with pytest.raises(ValueError, match=rf"; did you mean {hint}\?$"):
        ImageReaderStage(**options)


def test_editors_see_the_options_and_the_public_names():
    parameters = inspect.signature(ImageReaderStage).parameters
    assert "Literal" in parameters["fit"].annotation
    assert "args" not in parameters
    names = {name for name in dir(dask_imgread) if not name.startswith("_")}
    assert names == set(dask_imgread.__all__)
