"""Train a sentence VAE in plain PyTorch, write sentences with it, save it and load it again. Under a minute on a CPU."""

import tempfile
from functools import partial

import torch
from transformers import AutoModel, AutoTokenizer

from mmvae import TextVAE, TextVAEConfig
from mmvae.data import sprites
from mmvae.objectives import elbo
from mmvae.processing import decode_text, train_tokenizer
from mmvae.schedules import linear

torch.manual_seed(0)
captions = sprites(level=5, num_rows=4000)["caption"]
tokenizer = train_tokenizer(captions)
model = TextVAE(TextVAEConfig(vocab_size=len(tokenizer), embedding_size=64, hidden_size=64, latent_dim=16))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True)
beta = linear(steps=200, start=0.01, delay=300)
objective = partial(elbo, free_bits=0.5)  # nats per latent dimension: what keeps the decoder from ignoring the latent

model.train()
for step in range(700):
    rows = torch.randint(len(captions), (64,)).tolist()
    batch = tokenizer([captions[row] for row in rows], padding=True, return_tensors="pt")
    out = model(**batch, beta=beta(step), objective=objective)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    if step % 100 == 99:
        print(f"step {step + 1}: -ELBO {-out.elbo.mean().item():.2f} nats, KL {out.kl.mean().item():.2f} nats")

model.eval()
inputs = tokenizer(["small blue heart at top left on light", "big red square at bottom right on dark"], padding=True, return_tensors="pt")
latents = model.encode(**inputs).mean
print("reconstructed: ", decode_text(tokenizer, model.generate(latents=latents, num_beams=4, max_new_tokens=12)))
print("from the prior:", decode_text(tokenizer, model.sample(3, max_new_tokens=12)))
print("in between:    ", decode_text(tokenizer, model.interpolate(latents[:1], latents[1:], 5, max_new_tokens=12)))
known = captions[:1000]  # what is said to be near: rows whose latents were kept
means = model.encode(**tokenizer(known, padding=True, return_tensors="pt")).mean
nearest = torch.cdist(latents[:1], means).topk(3, largest=False).indices[0]
print("nearest rows:  ", [known[row] for row in nearest.tolist()])
pair = tokenizer(["big red square at bottom right on light", "big red square at bottom right on dark"], return_tensors="pt")
light, dark = model.encode(**pair).mean
unknown = [tokenizer.unk_token_id]  # a word that is not to be written
print("light to dark: ", decode_text(tokenizer, model.generate(latents=latents[:1] - light + dark, num_beams=4, suppress_tokens=unknown)))
print("log p(x):      ", model.log_marginal(**inputs, num_samples=100).tolist(), "nats")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoModel.from_pretrained(folder)
    same = torch.equal(again.generate(latents=latents, max_new_tokens=12), model.generate(latents=latents, max_new_tokens=12))
    print("loaded again:  ", type(again).__name__, AutoTokenizer.from_pretrained(folder).vocab_size, "tokens; same sentences:", same)
