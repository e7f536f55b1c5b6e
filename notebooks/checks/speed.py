"""Checks of notebook 8: the cache, its bytes, and the rows that are no longer needed."""
import torch


def cache_update(update):
    R, G, length, d, place = 2, 3, 7, 4, slice(3, 5)
    k_all, v_all = torch.zeros(R, G, length, d), torch.zeros(R, G, length, d)
    k_all[:, :, :3], v_all[:, :, :3] = torch.randn(R, G, 3, d), torch.randn(R, G, 3, d)
    before, k, v = (k_all.clone(), v_all.clone()), torch.randn(R, G, 2, d), torch.randn(R, G, 2, d)
    result = update(k_all, v_all, place, k, v)
    yield (isinstance(result, (tuple, list)) and len(result) == 2 and all(map(torch.is_tensor, result)),
           "two tensors are to come back, the keys and the values.", "print(type(result))")
    yield (torch.equal(k_all[:, :, :3], before[0][:, :, :3]), "keys of earlier tokens have changed.",
           "compare k_all[:, :, :place.start] before and after")
    yield (not torch.equal(k_all, before[0]), "nothing was written: after the call k_all is what it was.",
           "print(k_all[0, 0, :, 0]) before and after")
    yield (torch.equal(k_all[:, :, place], k), "the new keys do not stand at their places.",
           "print(k_all[0, 0, :, 0], k[0, 0, :, 0], place)")
    yield (torch.equal(v_all[:, :, place], v), "the keys are right, the values are not.",
           "print(v_all[0, 0, :, 0], v[0, 0, :, 0])")
    yield (result[0].shape[2] != k.shape[2], "only the new tokens come back: the query could look at nothing "
           "that came before it.", "print(result[0].shape, k.shape)")
    yield (result[0].shape[2] != length, "empty places come back as well, and in the softmax a key of zeros "
           "weighs e^0 = 1.", "print(result[0][0, 0, :, 0])")
    yield (all(part.shape == (R, G, 5, d) for part in result) and torch.equal(result[0][:, :, place], k) and
           torch.equal(result[1][:, :, place], v), "what comes back is not all that has been filled so far.",
           "print(result[0].shape, place)")
    yield (result[0].data_ptr() == k_all.data_ptr(), "what comes back is a copy, and copying a long cache at "
           "each step takes the time that it should save.",
           "compare result[0].data_ptr() and k_all.data_ptr()")


def memory(count):
    from model import GPT, GPTConfig
    sizes = dict(n_layer=3, rows=4, places=17, dim=32, n_head=4, n_kv_head=2, size=4)
    given = count(**sizes)
    yield isinstance(given, (int, float)), f"a number is asked for, not {type(given).__name__}.", "print it"
    for name, what in (("rows", "sequences"), ("n_layer", "layers"), ("places", "places"),
                       ("size", "bytes a number")):
        yield (count(**{**sizes, name: 2 * sizes[name]}) == 2 * given,
               f"twice as many {what} should take twice the memory.", f"double {name} alone")
    yield (count(**{**sizes, "n_kv_head": 4}) == 2 * given, "two query heads share a key here, yet it takes "
           "as much as if each had its own.", "change n_kv_head alone")
    yield (count(**{**sizes, "n_head": 8, "dim": 64}) == given, "more heads of the same width, with as many "
           "key-value heads as before, need no more.", "double n_head and dim together")
    gpt = GPT(GPTConfig(dim=32, n_layer=3, n_head=4, n_kv_head=2, vocab_size=8, block_size=16, num_classes=2))
    real = sum(part.nbytes for cache in gpt.new_caches(4) for part in vars(cache).values())
    yield (given != real / 2, "it is exactly half of what new_caches takes.",
           "print(vars(gpt.new_caches(1)[0]))")
    yield given == real, "everything grows as it should, but by a wrong factor.", \
        "sum up .nbytes of new_caches"


def drop_rows(drop):
    newest, k, v = torch.arange(6), torch.randn(6, 2, 5, 4), torch.randn(6, 2, 5, 4)
    result = drop(newest, k, v)
    yield (isinstance(result, (tuple, list)) and len(result) == 3 and all(map(torch.is_tensor, result)),
           "three tensors are to come back.", "print(type(result))")
    yield (all(len(part) == 3 for part in result), "of 6 rows 3 are conditional, and each of the three "
           "tensors should have as many.", "print the shapes")
    yield (result[0].tolist() != [3, 4, 5], "the unconditional rows stay, and the class is forgotten.",
           "read guide in sample.py: which half comes first?")
    yield (result[0].tolist() != [0, 2, 4], "conditional and unconditional rows do not alternate.",
           "read where generate makes twice as many rows")
    yield (torch.equal(result[0], newest[:3]) and torch.equal(result[1], k[:3]) and
           torch.equal(result[2], v[:3]),
           "tokens, keys and values are not those of the same rows.", "compare the three row by row")
    yield (result[1].data_ptr() == k.data_ptr() and result[2].data_ptr() == v.data_ptr(),
           "the caches were copied.", "compare the .data_ptr() of k before and after")
