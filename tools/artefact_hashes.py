"""Train every method briefly and print the SHA-256 of each weight file: equal before and after a change of no number.

``python tools/artefact_hashes.py > before.txt``, change, again into ``after.txt``, ``diff before.txt after.txt``.
Everything runs on the base `tiny` or from scratch, on one CPU thread, in about four minutes.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHORT = "--steps 6 --lr-warmup-steps 0 --train-batch-size 2 --dataloader-num-workers 0 --learning-rate 1e-3"
NO_SAMPLES = "--num-validation-images 0"
"""For every method but the classifier, which draws nothing."""
PIXELS = "--resolution 16 --block-out-channels 8 16 --attention-resolutions 8 --layers-per-block 1 --norm-num-groups 4"
RUNS = {
    "lora": "lora --config lora/tiny-hearts --use-ema",
    "lora-text-encoder": "lora --config lora/tiny-hearts --train-text-encoder --random-flip --snr-gamma 5",
    "lora-accumulated": "lora --config lora/tiny-hearts --gradient-accumulation-steps 2 --caption-dropout 0.3",
    "dreambooth-lora": "dreambooth --config dreambooth/tiny-subject --num-class-images 6",
    "dreambooth-full": "dreambooth --config dreambooth/tiny-subject-full --num-class-images 6",
    "dreambooth-pivotal": "dreambooth --config dreambooth/tiny-subject-pivotal --num-class-images 6",
    "textual-inversion": "textual-inversion --config textual-inversion/tiny-word",
    "text-to-image": "text-to-image --config text-to-image/tiny-hearts --dream",
    "ddpm": f"ddpm --config ddpm/digits {PIXELS}",
    "ddpm-classes": f"ddpm --config ddpm/digits-classes {PIXELS} --prediction-type v_prediction --noise-offset 0.05",
    "classifier": f"classifier --config classifier/digits {PIXELS} --attention-head-dim 8",
}


def main() -> None:
    """Train the methods named on the command line, or all."""
    names = sys.argv[1:] or RUNS
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SDTUNE_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        for name in names:
            words, out = RUNS[name], Path(folder, name)
            words += f" {SHORT}" if name == "classifier" else f" {SHORT} {NO_SAMPLES}"
            command = [sys.executable, "-m", "sdtune", *words.split(), "--output-dir", str(out)]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, cwd=folder)
            for file in sorted(json.loads((out / "artefact.json").read_text())["files"]):
                digest = hashlib.sha256((out / file).read_bytes()).hexdigest()
                print(f"{digest[:32]}  {name}/{file}", flush=True)


if __name__ == "__main__":
    main()
