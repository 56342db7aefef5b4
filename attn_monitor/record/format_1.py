"""Files of format 1, whose header holds all metrics by tag."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attn_monitor.measure.health import HEALTH_TAG
from attn_monitor.measure.metrics import MetricKey, Metrics
from attn_monitor.record.header_fields import Fields

MEAN = re.compile(r"attn/(?P<role>.+)/layer(?P<layer>[0-9]+)/(?P<metric>\w+)")
HEAD = re.compile(r"attn_heads/(?P<role>.+)/layer(?P<layer>[0-9]+)/(?P<metric>\w+)/head(?P<head>[0-9]+)")


class Tags:
    """Metrics of such a header, by layer; ``flags_raised`` as in `AttentionSnapshot`."""

    def __init__(self, stored: Mapping[str, Any]) -> None:
        values = Fields(dict(stored), "header's metrics")
        self.flags_raised, self._metrics = 0, Metrics()
        for tag in values:
            if tag == HEALTH_TAG:
                self.flags_raised = int(values.number(tag))
            elif found := HEAD.fullmatch(tag) or MEAN.fullmatch(tag):
                parts = found.groupdict()
                head = int(parts["head"]) if "head" in parts else None
                key = MetricKey(parts["role"], int(parts["layer"]), parts["metric"], head)
                self._metrics[key] = values.number(tag)

    def of_layer(self, role: str, layer: int) -> Metrics:
        """Those of one layer."""
        return Metrics({key: value for key, value in self._metrics.items() if key[:2] == (role, layer)})
