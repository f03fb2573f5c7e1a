"""From plain classes to processes. The only place that imports `ray`."""
