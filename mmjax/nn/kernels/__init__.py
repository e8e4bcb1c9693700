"""How attention by intervals is computed on a device; nn.attention is the contract."""
