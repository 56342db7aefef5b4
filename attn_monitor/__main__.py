"""`python -m attn_monitor`: the `attn-monitor` command."""

from attn_monitor.offline.cli import main

main()
