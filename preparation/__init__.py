"""From text, or shards that others published, to token shards: the parts of prepare_fineweb.py."""
