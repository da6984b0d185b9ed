-- The default table: one row per metric and time. Partitioned by time from the start, so that retention is a cheap drop.

CREATE TABLE readings (
    time       timestamptz NOT NULL,
    device     text NOT NULL,
    metric     text NOT NULL,
    value      double precision,
    value_text text
) PARTITION BY RANGE (time);

-- "This device, this metric, newest first."
CREATE INDEX readings_device_metric_time ON readings (device, metric, time DESC);

-- Takes what no other partition takes: very late data, and times ahead of the partitions made so far.
CREATE TABLE readings_default PARTITION OF readings DEFAULT;

-- The bridge makes partitions only for a table that says so here; a table of your own it leaves alone.
COMMENT ON TABLE readings IS 'Made by mqtt-bridge, which also makes its weekly partitions.';
