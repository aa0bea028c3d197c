"""A Hub that fails in the middle of a file, is too busy, or is not there; run by hub_scenario.py, reported by test_hub.py.

Nothing waits: the seconds that huggingface_hub would sleep between two attempts are counted.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

from localhub import Handler

PASSING, LASTING = 2, 1000  # how many requests fail
# the connection ends after half of a file, half of it comes as if it were the whole, a byte is wrong, too many requests, no Hub
FAULTS = [("cut", PASSING), ("cut", LASTING), ("half", LASTING), ("byte", LASTING)]
FAULTS += [("429", PASSING), ("429", LASTING), ("503", PASSING), ("503", LASTING)]


class FaultyHandler(Handler):
    """A Hub with a fault in sending one file, or at one address that is written to."""

    fault, left, place = None, 0, ""

    def handle_any(self):
        if self.command in ("POST", "PUT") and self.fails():
            self.body()
            return super().send(int(self.fault), {"error": "broken down"})
        return super().handle_any()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def fails(self):
        if not type(self).left or self.place not in self.path or (self.command == "HEAD" and not self.fault.isdecimal()):
            return False
        type(self).left -= 1
        return True

    def send(self, code, obj=None, headers=None, raw=None, length=None):
        if self.command not in ("GET", "HEAD") or not self.fails():
            return super().send(code, obj, headers, raw, length)
        if self.fault.isdecimal():
            return super().send(int(self.fault), {"error": "busy"}, {"Retry-After": "7"})
        middle = len(raw) // 2
        if self.fault == "cut":
            self.close_connection = True
            return super().send(code, headers=headers, raw=raw[:middle], length=len(raw))
        return super().send(code, headers=headers, raw=raw[:middle] if self.fault == "half" else raw[:-9] + b"\1" + raw[-8:])


def faults(hub, root):
    """What came of loading a model and rows, and of pushing, under every fault; and of the same once the Hub works again."""
    import datasets
    from huggingface_hub import HfApi, constants

    from mmvae import TextVAE, TextVAEConfig
    from mmvae.data import load_rows
    from mmvae.hub import push

    def attempt(call, fault=None, place="", left=0):
        handler.fault, handler.place, handler.left = fault, place, left
        naps, before = [], len(hub.srv.requests)
        with mock.patch("time.sleep", naps.append):
            try:
                outcome = call()
            except Exception as error:
                outcome = " ".join([type(error).__name__, str(error), *getattr(error, "__notes__", [])])
        handler.left = 0
        halves = [path.name for path in cache.rglob("*.incomplete")]
        return {"outcome": outcome, "slept": sum(naps), "requests": len(hub.srv.requests) - before, "halves": halves}

    def fresh():
        shutil.rmtree(cache, ignore_errors=True)

    handler, cache = hub.srv.RequestHandlerClass, Path(constants.HF_HOME)
    folder, seen = root / "vae", {}
    model = TextVAE(TextVAEConfig(vocab_size=9, embedding_size=4, hidden_size=4, latent_dim=2))
    model.save_pretrained(folder)
    push(folder, "alice/vae")
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(300)))
    api = HfApi()
    api.create_repo("alice/rows", repo_type="dataset")
    api.upload_file(path_or_fileobj=root / "rows.jsonl", path_in_repo="train.jsonl", repo_id="alice/rows", repo_type="dataset")
    calls = {
        "model.safetensors": lambda **options: type(TextVAE.from_pretrained("alice/vae", **options)).__name__,
        "train.jsonl": lambda **options: len(load_rows("alice/rows", **options)),
    }
    again = {"model.safetensors": {"force_download": True}, "train.jsonl": {"download_mode": "force_redownload"}}
    for place, call in calls.items():
        for fault, left in FAULTS:
            fresh()
            case = attempt(call, fault, place, left)
            case["then"] = attempt(partial(call, **again[place] if fault == "byte" else {}))["outcome"]
            seen[f"{place} {fault} {'passing' if left == PASSING else 'lasting'}"] = case
    calls["model.safetensors"]()
    with mock.patch.object(constants, "HF_HUB_OFFLINE", True), mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True):
        for place, call in calls.items():
            seen[f"{place} offline kept"] = attempt(call)
        fresh()
        for place, call in calls.items():
            seen[f"{place} offline"] = attempt(call)
    for place, left in (("/__lfs__/", PASSING), ("/__lfs__/", LASTING), ("/commit/", LASTING)):
        next(model.parameters()).data.add_(1)
        model.save_pretrained(folder)
        fresh()
        head = api.model_info("alice/vae").sha
        case = attempt(lambda: push(folder, "alice/vae").split("/")[-1], "503", place, left)
        case["old"] = api.model_info("alice/vae").sha == head
        case["then"] = attempt(lambda: push(folder, "alice/vae").split("/")[-1])["outcome"]
        seen[f"push {place} {'passing' if left == PASSING else 'lasting'}"] = case
    return seen
