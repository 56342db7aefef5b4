"""The commands of `attn-monitor`, one module each; the module's docstring is the command's help."""
