"""What a task answers without a server: the reference of what is served."""

import torch
from transformers import AutoTokenizer

from flexmerge_cli import open_bundle


class Offline:
    """A task of a bundle, without a server."""

    def __init__(self, bundle, task):
        self.tokenizer = AutoTokenizer.from_pretrained(bundle / "tasks" / task)
        self.model = open_bundle(bundle).model(task)

    def completion(self, prompt, max_tokens):
        """(text behind the prompt, tokens, finish)."""
        ids = self.tokenizer(prompt, return_tensors="pt")
        made = self.model.generate(**ids, max_new_tokens=max_tokens, do_sample=False)[0]
        start = ids["input_ids"].shape[1]
        before, whole = (self.tokenizer.decode(part, skip_special_tokens=True) for part in (made[:start], made))
        has_ended = made[-1] == self.model.config.eos_token_id
        return whole[len(before) :], len(made) - start, "stop" if has_ended else "length"

    def drawn(self, prompt, max_tokens, seed, temperature, top_p):
        """Tokens drawn one by one, each from a forward of all before it."""
        ids = self.tokenizer(prompt)["input_ids"]
        generator = torch.Generator().manual_seed(seed)
        start = len(ids)
        while len(ids) < start + max_tokens:
            with torch.inference_mode():
                chances = (self.model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)
            kept, total = torch.zeros_like(chances), 0.0
            for token in chances.argsort(descending=True):
                if total >= top_p:
                    break
                kept[token] = chances[token]
                total += float(chances[token])
            ids.append(int(torch.multinomial(kept, 1, generator=generator)))
            if ids[-1] == self.model.config.eos_token_id:
                break
        return self.tokenizer.decode(ids, skip_special_tokens=True)[len(prompt) :]

    def logits(self, text, pair=None):
        """Return what a head gives for one text: [outputs]."""
        with torch.inference_mode():
            return self.model(**self.tokenizer(text, pair, return_tensors="pt")).logits[0]
