"""From chunks of a turn to pieces that a voice can speak: `shaper` puts together `clean` (with `markup`) and `cut`."""
