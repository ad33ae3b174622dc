"""Make the pictures in docs/images again: run the demo, and photograph what it leaves.

    python docs/make_pictures.py

Needs Chromium, as one of the tests does.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import gettempdir

from PIL import Image

from dask_imgread import FileGroupTask, ImageReaderStage, show

IMAGES = Path(__file__).parent / "images"
WIDTH = 800  # pixels of a picture


def main() -> None:
    """Make all pictures."""
    IMAGES.mkdir(exist_ok=True)
    folder = Path(gettempdir(), "pictures")  # a short path, since the pages show it
    folder.mkdir()
    try:
        os.chdir(folder)
        subprocess.run([sys.executable, "-m", "dask_imgread", "demo"], check=True)
        demo = Path("dask-imgread-demo")
        save(Image.open(demo / "contact-sheet.png"), "contact-sheet")
        save(photograph(demo / "report.html", 1000, 735), "report")
        save(photograph(write_notebook(demo), 790, 470), "notebook")
    finally:
        shutil.rmtree(folder)


def write_notebook(demo: Path) -> Path:
    """Write what a notebook shows of a batch that has a broken image."""
    task = FileGroupTask(data=[str(demo / "shards" / "00002.tar")])
    batches = ImageReaderStage(device="cpu", verbose=False).process(task)
    (batch,) = [batch for batch in batches if batch.failed]
    page = Path("batch.html")
    show(batch, n=12).save(str(page))
    return page


def photograph(page: Path, width: int, height: int) -> Image.Image:
    """Return the upper part of an HTML page, at twice the size of its CSS pixels."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    browser = next(filter(None, found), None)
    if browser is None:
        raise SystemExit("there is no Chromium to photograph pages with")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--force-device-scale-factor=2", f"--window-size={width},{height}"]
    command += ["--virtual-time-budget=5000", "--screenshot=page.png", page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return Image.open("page.png")


def save(picture: Image.Image, name: str) -> None:
    """Write a picture, made smaller, as WebP."""
    picture = picture.convert("RGB")
    picture.thumbnail((WIDTH, picture.height))
    picture.save(IMAGES / f"{name}.webp", quality=85, method=6)


if __name__ == "__main__":
    main()
