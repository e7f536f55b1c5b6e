"""Typical wrong answers of notebook 8, and words of what each has to be told."""
WRONG = {
    "cache_update": [
        ("def cache_update(k_all, v_all, place, k, v):\n"
         "    k_all[:, :, place], v_all[:, :, place] = k, v\n"
         "    return k_all, v_all", "empty places come back"),
        ("def cache_update(k_all, v_all, place, k, v):\n"
         "    k_all[:, :, place], v_all[:, :, place] = k, v\n"
         "    return k, v", "only the new tokens come back"),
        ("def cache_update(k_all, v_all, place, k, v):\n"
         "    later = slice(place.start + 1, place.stop + 1)\n"
         "    k_all[:, :, later], v_all[:, :, later] = k, v\n"
         "    return k_all[:, :, :place.stop + 1], v_all[:, :, :place.stop + 1]",
         "do not stand at their places"),
        ("import torch\ndef cache_update(k_all, v_all, place, k, v):\n"
         "    join = lambda old, new: torch.cat([old[:, :, :place.start], new], dim=2)\n"
         "    return join(k_all, k), join(v_all, v)", "nothing was written"),
    ],
    "memory": [
        ("def memory(n_layer, rows, places, dim, n_head, n_kv_head, size):\n"
         "    return n_layer * rows * places * n_kv_head * (dim // n_head) * size", "exactly half"),
        ("def memory(n_layer, rows, places, dim, n_head, n_kv_head, size):\n"
         "    return 2 * n_layer * rows * places * dim * size", "as if each had its own"),
        ("def memory(n_layer, rows, places, dim, n_head, n_kv_head, size):\n"
         "    return 2 * n_layer * places * n_kv_head * (dim // n_head) * size", "twice as many sequences"),
    ],
    "drop_rows": [
        ("def drop_rows(newest, k, v):\n"
         "    B = len(newest) // 2\n"
         "    return newest[B:], k[B:], v[B:]", "the class is forgotten"),
        ("def drop_rows(newest, k, v):\n"
         "    return newest[::2], k[::2], v[::2]", "do not alternate"),
        ("def drop_rows(newest, k, v):\n"
         "    B = len(newest) // 2\n"
         "    return newest[:B], k[:B].clone(), v[:B].clone()", "were copied"),
    ],
}
