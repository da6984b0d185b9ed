-- The bridge's own bookkeeping, version 2. Every statement may run again without harm.

CREATE SCHEMA IF NOT EXISTS mqtt_bridge;

CREATE TABLE IF NOT EXISTS mqtt_bridge.schema_version (
    version    integer PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- Messages that could not be stored, with their bytes and the reason.
CREATE TABLE IF NOT EXISTS mqtt_bridge.dead_letters (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    received_at timestamptz NOT NULL,
    topic       text NOT NULL,
    payload     bytea NOT NULL,
    qos         smallint NOT NULL,
    retain      boolean NOT NULL,
    properties  jsonb,
    route       text,
    stage       text NOT NULL,
    error       text NOT NULL,
    sqlstate    text,
    client_id   text NOT NULL,
    requeued_at timestamptz
);
CREATE INDEX IF NOT EXISTS dead_letters_received_at ON mqtt_bridge.dead_letters (received_at);

-- Who owns a client id, and which MQTT session it is in.
CREATE TABLE IF NOT EXISTS mqtt_bridge.owners (
    client_id     text PRIMARY KEY,
    owner_epoch   bigint NOT NULL,
    session_epoch bigint NOT NULL,
    subscriptions text, -- filters that the session has, one a line
    retained_seen text, -- whose retained messages were stored, or were never asked for: `stored a/+`, one a line
    spool_id      text,
    last_seen     timestamptz NOT NULL DEFAULT now(),
    member_of     text  -- MQTT_CLIENT_ID of the bridge that has a process for this client id; NULL: just this client id
);
-- Version 1 did not have it.
ALTER TABLE mqtt_bridge.owners ADD COLUMN IF NOT EXISTS member_of text;

-- Which deliveries are committed although the broker may not know it yet.
CREATE TABLE IF NOT EXISTS mqtt_bridge.ledger (
    client_id      text NOT NULL,
    owner_epoch    bigint NOT NULL,
    batch          bigint NOT NULL,
    session_epoch  bigint NOT NULL,
    first_position bigint NOT NULL,
    entries        bytea NOT NULL,
    PRIMARY KEY (client_id, owner_epoch, batch)
) WITH (
    -- Small and hot: a row comes and goes with every batch.
    autovacuum_vacuum_threshold = 200,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_cost_delay = 0,
    toast.autovacuum_vacuum_threshold = 200,
    toast.autovacuum_vacuum_scale_factor = 0,
    toast.autovacuum_vacuum_cost_delay = 0
);
-- Hashes do not compress.
ALTER TABLE mqtt_bridge.ledger ALTER COLUMN entries SET STORAGE EXTERNAL;

INSERT INTO mqtt_bridge.schema_version (version) VALUES (1), (2) ON CONFLICT DO NOTHING;
