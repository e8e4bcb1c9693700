"""The built-in drawings: 1,594 emoji in three styles, with English names and groups (see NOTICE for sources)."""
