"""Push a model folder to a Hub over HTTP and get it back; run by test_hub.py in a process of its own, and reports in JSON.

In its own process because huggingface_hub reads HF_ENDPOINT when it is imported.   python tests/hub_scenario.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

from hub_faults import FaultyHandler, faults
from localhub import LocalHub


def state(hub, repo_id):
    """Head and file names of a repository, as the server has them."""
    repo = hub.srv.store.repos[f"model/{repo_id}"]
    head = repo["refs"]["main"]
    return {
        "head": head,
        "commits": len(repo["log"]),
        "files": sorted(repo["commits"][head]["files"]),
        "private": repo["private"],
    }


def failure(call):
    """Type and message of what a call raises."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def scenario(hub, folder):
    import torch
    from huggingface_hub import CommitOperationAdd, HfApi
    from transformers import AutoTokenizer, BertModel

    from mmvae.hub import push

    seen = {}
    url = push(folder, "alice/tiny", private=True)
    seen["url"], seen["first"] = url, state(hub, "alice/tiny")

    ours, theirs = BertModel.from_pretrained(folder), BertModel.from_pretrained("alice/tiny")
    seen["weights_equal"] = all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    seen["tokens"] = AutoTokenizer.from_pretrained("alice/tiny")("a small heart").input_ids
    seen["stranger"] = failure(lambda: BertModel.from_pretrained("alice/tiny", token="hf_local_mallory", force_download=True))

    with torch.no_grad():
        ours.embeddings.word_embeddings.weight.add_(1)
    ours.save_pretrained(folder)
    for figure in (folder / "figures").glob("*.png"):
        figure.rename(figure.with_name("renamed.png"))
    FaultyHandler.fault, FaultyHandler.place, FaultyHandler.left = "500", "/commit/", 1  # after every file has arrived
    seen["broken"], seen["after_failure"] = (
        failure(lambda: push(folder, "alice/tiny", private=True)),
        state(hub, "alice/tiny"),
    )
    again = BertModel.from_pretrained("alice/tiny", force_download=True)
    seen["old_revision_whole"] = all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), theirs.state_dict().values(), strict=True)
    )
    more = ("assets/banner.png", "unet/x.safetensors", "model-00001-of-00002.safetensors")
    HfApi().create_commit("alice/tiny", [CommitOperationAdd(name, b"more") for name in more], commit_message="More")
    push(folder, "alice/tiny", private=True)
    seen["second"] = state(hub, "alice/tiny")
    push(folder, "alice/tiny", revision="trial")
    seen["branches"] = sorted(hub.srv.store.repos["model/alice/tiny"]["refs"])

    push(folder, "alice/open")
    seen["public_asked_private"] = failure(lambda: push(folder, "alice/open", private=True))
    seen["own"] = {name: own(hub, folder.parent / "own", name) for name in ("text_vae", "image_vae", "joint_vae")}
    seen["faults"] = faults(hub, folder.parent)
    seen["unknown_endpoints"] = hub.srv.unknown
    return seen


def own(hub, root, name):
    """What came back of a run of a real recipe with ``--push_to_hub``."""
    import torch
    from recipe_runs import IMAGE, TEXT, TINY, pictures, run, sentences
    from transformers import AutoModel, AutoProcessor

    small = ["--modalities", "words:text:text", "--vaes", '{"text": {"embedding_size": 8, "hidden_size": 8}}', "--private_dims", "{}"]
    small += ["--modality_dropout", "{}", "--likelihood_weights", "{}", "--densities", "{}", "--objective", "elbo", *TINY]
    makers = {"text_vae": (sentences, TEXT), "image_vae": (pictures, IMAGE), "joint_vae": (sentences, small)}
    data, options = makers[name][0](root / f"{name} data"), makers[name][1]
    place = ["--dataset", str(data), "--output_dir", str(root / name), "--push_to_hub", "--hub_model_id", f"alice/{name}"]
    run(name, [*place, "--hub_private", "--hub_token", os.environ["HF_TOKEN"], *options])
    here, there = AutoModel.from_pretrained(root / name), AutoModel.from_pretrained(f"alice/{name}")
    processor = AutoProcessor.from_pretrained(f"alice/{name}")
    if name == "text_vae":
        inputs = processor(["small red heart", "blue"], padding=True, return_tensors="pt")
    elif name == "joint_vae":
        inputs = processor(words=["small red heart", "blue"], return_tensors="pt")
    else:
        inputs = processor([torch.full((3, 30, 20), 7, dtype=torch.uint8)], return_tensors="pt")
    return state(hub, f"alice/{name}") | {
        "class": type(there).__name__,
        "weights_equal": all(torch.equal(x, there.state_dict()[key]) for key, x in here.state_dict().items()),
        "latents_equal": torch.equal(here.posterior(**inputs).mixture.mean, there.posterior(**inputs).mixture.mean),
    }


def main():
    with LocalHub() as hub:
        hub.srv.RequestHandlerClass = FaultyHandler
        os.environ["HF_ENDPOINT"] = hub.url
        print(json.dumps(scenario(hub, Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
