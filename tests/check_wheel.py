"""Run where only the wheel and its onnx extra are installed: draws a picture without torch."""

import importlib.util
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WANTED = (
    "edgeflash/py.typed",
    "edgeflash/distill/loop.py",
    "edgeflash/distill/recipes/shapes.toml",
    "edgeflash/export/line.py",
    "edgeflash/runtimes/pipeline.py",
    "edgeflash/models/shapes-student/edgeflash.json",
    "edgeflash/models/shapes-teacher/model_index.json",
    "edgeflash/models/shapes-teacher/unet/diffusion_pytorch_model.safetensors",
    "edgeflash/models/shapes-judge/judge/config.json",
)


def strays(files: list[str]) -> list[str]:
    """Installed files that the source tree does not hold: left over from an older build."""
    ours = [name for name in files if name.startswith("edgeflash/") and "__pycache__" not in name]
    return [name for name in ours if not (ROOT / name).is_file()]


def check_files(files: list[str]) -> None:
    tops = {name.split("/")[0] for name in files if not name.startswith("..")}
    assert {t for t in tops if ".dist-info" not in t} == {"edgeflash"}, f"installs {sorted(tops)}"
    lacking = [name for name in WANTED if name not in files]
    assert not lacking, f"the wheel lacks {lacking}"
    assert not strays(files), f"not in the source tree: {strays(files)}"


def check_commands(bundle: Path) -> None:
    command = [str(Path(sys.executable).with_name("edgeflash"))]
    for arguments in (
        ["--help"],
        ["list"],
        ["list", "onnx"],
        ["doctor"],
        ["inspect", str(bundle)],
        ["verify", str(bundle)],
    ):
        subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)
    picture = Path("picture.png")
    drawing = ["run", str(bundle), "--prompt", "a red circle", "--seed", "3", "--out", str(picture)]
    subprocess.run([*command, *drawing], check=True)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    for arguments in (["distill", "shapes"], ["demo"], ["export", "nowhere", "--to", "onnx"]):
        refused = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused
        assert "pip install 'edgeflash[" in refused.stderr, refused


if __name__ == "__main__":
    assert importlib.util.find_spec("torch") is None, "the device-side install must not bring torch"
    check_files([str(path) for path in distribution("edgeflash").files or ()])
    check_commands(Path(sys.argv[1]))
    print("wheel: ok, drew a picture without torch")
