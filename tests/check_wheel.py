"""Run where only the wheel and its onnx extra are installed: draws a picture without torch."""

import importlib.util
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

bundle = Path(sys.argv[1])
assert importlib.util.find_spec("torch") is None, "the device-side install must not bring torch"
files = [str(path) for path in distribution("edgeflash").files or ()]
tops = {path.split("/")[0] for path in files if not path.startswith("..")}
assert {t for t in tops if ".dist-info" not in t} == {"edgeflash"}, f"installs {sorted(tops)}"
wanted = (
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
lacking = [name for name in wanted if name not in files]
assert not lacking, f"the wheel lacks {lacking}"

command = [str(Path(sys.executable).with_name("edgeflash"))]
for arguments in (
    ["--help"],
    ["list"],
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
print("wheel: ok, drew a picture without torch")
