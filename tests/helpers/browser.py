"""A page in Chromium: what it shows, and whether its script works."""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

from PIL import Image

BROWSERS = map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])
CHROMIUM = next(filter(None, BROWSERS), None)
WIDE, NARROW = (1280, 900), (420, 900)

# Clicks on a picture, on a table's headings and on a button that copies, and then says what it has
# seen. The texts of a plot are its labels and the names of its axes.
_PROBE = """
<script>
  const all = (what, within = document) => [...within.querySelectorAll(what)];
  const meet = (a, b) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;

  function countOverprints(texts) {
    const boxes = texts.map((text) => {
      const range = document.createRange();
      range.selectNodeContents(text);
      return range.getBoundingClientRect();
    });
    return boxes.flatMap((a, n) => boxes.slice(n + 1).filter((b) => meet(a, b))).length;
  }

  function measure(colour) {
    const levels = colour.match(/[\\d.]+/g).slice(0, 3).map((level) => level / 255);
    const light = levels.map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2] + 0.05;
  }

  function compare(text) {
    const panel = getComputedStyle(text.closest(".panel")).backgroundColor;
    const [a, b] = [getComputedStyle(text).color, panel].map(measure);
    return Math.max(a, b) / Math.min(a, b);
  }

  const plots = all(".plot"), rankings = all(".ranking");
  const labels = (plot) => all("span, :scope > div:not(.area, .ticks)", plot);
  const found = {
    title: document.title,
    width: innerWidth,
    beyond: document.documentElement.scrollWidth - innerWidth,
    plots: plots.length,
    unlabelled: plots.filter((plot) => labels(plot).some((text) => !text.textContent)).length,
    overprints: [...plots.map(labels), ...rankings.map((each) => all("span", each))]
      .map(countOverprints).filter(Boolean).length,
    contrast: Math.min(...plots.flatMap(labels).map(compare)),
    lost: all("nav a").filter((link) => !document.querySelector(link.hash)).length,
  };
  const [shown] = all("dialog"), [picture] = all("button.picture");
  picture.click();
  found.enlarged = shown.open && shown.querySelector("img").width > picture.offsetWidth;
  shown.click();
  found.closed = !shown.open;
  const table = document.querySelector(".sortable"), headings = all("th button", table);
  found.sorted = [3, 3, 0].map((place) => {
    headings[place].click();
    return [...table.tBodies[0].rows].map((row) => row.cells[place].textContent);
  });
  all(".command button").forEach((button) => button.click());
  found.selected = getSelection().toString();
  found.text = document.body.textContent;
  parent.postMessage(JSON.stringify(found), "*");
  console.log("probed");
</script>
"""

# Chromium's windows are not narrower than 500 pixels, a frame in one may be.
_FRAME = """<!DOCTYPE html>
<body style="margin: 0"><pre></pre>
<iframe src="probed.html" style="border: 0" width="{}" height="{}"></iframe>
<script>
  addEventListener("message", ({{ data }}) => (document.querySelector("pre").textContent = data));
</script>
"""


def browse(page, folder, *options):
    """Open a page; return what Chromium writes, and what scripts write to the console."""
    flags = [
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "host-resolver-rules=MAP * ~NOTFOUND", "virtual-time-budget=10000", "hide-scrollbars",
        "enable-logging=stderr", "v=0", f"user-data-dir={folder}", *options,
    ]  # fmt: skip
    command = [CHROMIUM, *(f"--{flag}" for flag in flags), Path(page).as_uri()]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"HOME": str(folder)},
        check=True,
    )
    said = re.findall(r"CONSOLE.*?\] (.*)", done.stderr)
    return done.stdout, [s for s in said if not re.search("setting log level|idle at", s)]


def probe(page, folder, size, is_dark):
    """Return what a page looks like, and what it does when it is clicked on."""
    text = Path(page).read_text("utf-8")
    (folder / "probed.html").write_text(text + _PROBE, "utf-8")
    frame = folder / "frame.html"
    frame.write_text(_FRAME.format(*size), "utf-8")
    shown, said = browse(frame, folder, "dump-dom", *_choose((1280, 900), is_dark))
    assert [line.split(",")[0] for line in said] == ['"probed"']
    return json.loads(unescape(re.search("<pre>(.*)</pre>", shown, re.DOTALL)[1]))


def draw(page, folder, size, is_dark=False):
    """Return how many pixels of a page have each colour."""
    picture = folder / "page.png"
    browse(page, folder, f"screenshot={picture}", *_choose(size, is_dark))
    with Image.open(picture) as image:
        return {colour: n for n, colour in image.convert("RGB").getcolors(1 << 24)}


def _choose(size, is_dark):
    return f"window-size={size[0]},{size[1]}", f"blink-settings=preferredColorScheme={1 - is_dark}"
