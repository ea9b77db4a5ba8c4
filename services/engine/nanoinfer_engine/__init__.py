"""The engine service: token ids in, token ids out; scheduler, paged KV cache, model, sampler."""
