"""From captions to a curated set: choose images by what is said of them; write new shards.

Captions are the `.txt` files beside the images. No image is decoded to choose one:

    python examples/captions.py "shards/*.tar" curated
"""

import sys

import pandas as pd

from dask_imgread import connect_client, read_metadata, write_shards

WORDS = (3, 40)  # fewer say nothing; more are often menus and lists of links


def choose(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of pictures with a caption of their own."""
    words = rows["caption"].str.split().str.len()
    readable = rows["error"].isna() & words.between(*WORDS).fillna(False)
    # The same words under many pictures are a title of the site, not of the picture.
    caption = rows["caption"].str.lower().str.strip()
    return rows[readable & ~caption.duplicated(keep=False)].drop_duplicates("sha256")


def main(path: str, out: str = "curated") -> pd.DataFrame:
    """Write the chosen images of `path` to `out`, and return their rows."""
    with connect_client() as client:
        rows = read_metadata(path, sidecars={"txt": "caption"}, checksum=True).compute()
        chosen = choose(rows)
        # Shuffled with a seed: neighbours in a crawl are alike, and the next run is the same.
        written = write_shards(chosen, out, shuffle=1, client=client).compute()
    print(f"{len(written)} of {len(rows)} images are in {out}")
    return written


if __name__ == "__main__":  # the worker processes import this file
    main(*sys.argv[1:])
