"""Where the kernels' sources are: beside the modules in an installed wheel, in the checkout of an editable install."""

from __future__ import annotations

from pathlib import Path


def source_dir() -> Path:
    """The directory that holds ``params.h``, ``cpu/`` and ``cuda/``.

    Raises: FileNotFoundError if the installation lacks it.
    """
    package = Path(__file__).resolve().parents[2]
    places = (package / "_csrc", package.parent / "csrc")
    for place in places:
        if (place / "params.h").is_file():
            return place
    raise FileNotFoundError(
        f"vision_mamba: the kernels' sources are in neither {places[0]} nor {places[1]}; "
        f"reinstall the package, `pip install --force-reinstall --no-deps .` in its checkout."
    )
