"""Count the decoder layers that run as one call each, and decode a few tokens one by one."""

from kernels import cpu_layer


def calls(monkeypatch):
    """A list that grows by one entry at each call of a whole layer."""
    made, own = [], cpu_layer.run
    monkeypatch.setattr(cpu_layer, "run", lambda *given: made.append(1) or own(*given))
    return made


def one_by_one(model, ids, words):
    """What `model` gives for the last of `words` tokens of `ids`, (texts, length), fed one by one after all of them."""
    out = model(input_ids=ids, use_cache=True)
    for place in range(words):
        token = ids[:, place % ids.shape[1], None]
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return out
