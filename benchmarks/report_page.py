"""The page of docs/report.md: trains two small models, saves their reports, and photographs the pages in a headless Chromium.

    python benchmarks/report_page.py                 writes docs/report/*.png, and the pages beside them to a temporary folder
    python benchmarks/report_page.py --pages FOLDER  writes the pages there and photographs nothing

The first run is as it should be. The second is seeded, samples by itself and has an infinite epsilon at one delta: what a reader
must see first. Needs the ``report`` extra, ``chromium`` and, to make the files small, Pillow (which matplotlib brings).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import Monitor, PrivacyEngine, PrivacyReport
from ghostgrad.accounting import Opaque

ROOT = Path(__file__).resolve().parent.parent
COLOURS = 128


def images(n: int) -> TensorDataset:
    """Made-up images of 16 by 16 in four classes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 4
    x = torch.randn(n, 1, 16, 16, generator=generator) + y.view(-1, 1, 1, 1) / 4
    return TensorDataset(x, y)


def network() -> nn.Module:
    """A small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 4),
    )  # fmt: skip


def good() -> PrivacyReport:
    """Secure noise, Poisson samples, a kept budget, counts for 1 % of it."""
    module, engine = network(), PrivacyEngine(accountant="pld", secure_mode=True)
    module, optimizer, loader = engine.make_private_with_epsilon(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.5), max_grad_norm=1.0, target_epsilon=3.0,
        data_loader=DataLoader(images(6000), batch_size=300), target_delta=1e-5, epochs=3, clipping="automatic",
    )  # fmt: skip
    Monitor(engine, private_share=0.01)
    for _ in range(3):
        for x, y in loader:
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return engine.report(
        title="Image classifier",
        privacy_unit="one image; every person has at most one",
        statements={
            "hyper_parameters": "fixed beforehand, on made-up images",
            "metrics": "none are published",
            "starting_weights": "drawn at random",
        },
    )


def doubtful() -> PrivacyReport:
    """A seed, batches of one's own, and a release that was written down by hand."""
    module, engine = nn.Linear(256, 4), PrivacyEngine(seed=1)
    module, optimizer, _ = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.5), data_loader=None, noise_multiplier=0.8,
        max_grad_norm=1.0, sample_rate=0.05, expected_batch_size=300.0,
    )  # fmt: skip
    for x, y in DataLoader(images(6000), batch_size=300, shuffle=True):
        F.cross_entropy(module(x.flatten(1)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.accountant.record(Opaque(0.2, 1e-7))
    return engine.report(title="Linear baseline")


def photograph(page: Path, picture: Path, *, dark: bool, height: int) -> None:
    """A PNG of a page in few colours."""
    from PIL import Image

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or sys.exit("chromium is not installed")
    dark_mode = ["--blink-settings=preferredColorScheme=0", "--force-dark-mode"] if dark else []
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *dark_mode, f"--screenshot={picture}",
         f"--window-size=1100,{height}", page.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with Image.open(picture) as image:
        image.convert("RGB").quantize(COLOURS).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=Path, help="only write the pages, to this folder")
    only = parser.parse_args().pages
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = only or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, report, dark, height in (("holds", good(), False, 2900), ("does-not-hold", doubtful(), True, 1250)):
            for suffix in (".html", ".json", ".md"):
                report.save(folder / f"{name}{suffix}")
            if only is None:
                picture = ROOT / "docs" / "report" / f"{name}.png"
                picture.parent.mkdir(exist_ok=True)
                photograph(folder / f"{name}.html", picture, dark=dark, height=height)
                print(f"{picture.relative_to(ROOT)}: {picture.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
