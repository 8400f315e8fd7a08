-- Least privilege for an outbox in one schema. Run as a superuser or as the schema's owner, after `outbox-relay migrate`:
--
--   psql -v schema=public -v owner=outbox_owner -v writer=app -v relay=outbox_relay -f roles.sql
--
-- owner   owns the tables and types; cannot log in: its members migrate as it, with ?options=-crole%3Doutbox_owner
--         at the end of the database's URL
-- writer  the application: adds events and can do nothing else to them
-- relay   claims and settles: reads events, updates their outcome, deletes them; never adds one or changes what it says
--
-- PostgreSQL 14 lets everybody create functions and tables in the schema `public`, these roles too; later ones do not.
-- Unless something of yours lives on that: REVOKE CREATE ON SCHEMA public FROM PUBLIC;
\set ON_ERROR_STOP on

BEGIN;

SELECT format('CREATE ROLE %I NOLOGIN', :'owner')
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'owner') \gexec
SELECT format('CREATE ROLE %I LOGIN', :'writer')
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'writer') \gexec
SELECT format('CREATE ROLE %I LOGIN', :'relay')
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'relay') \gexec

GRANT USAGE, CREATE ON SCHEMA :"schema" TO :"owner";
GRANT USAGE ON SCHEMA :"schema" TO :"writer", :"relay";

ALTER TABLE :"schema".outbox OWNER TO :"owner";
ALTER TABLE :"schema".outbox_lane OWNER TO :"owner";
ALTER TABLE :"schema".outbox_hold OWNER TO :"owner";
ALTER TABLE :"schema".outbox_epoch OWNER TO :"owner";
ALTER TYPE :"schema".outbox_kind OWNER TO :"owner";
ALTER TYPE :"schema".outbox_state OWNER TO :"owner";
ALTER FUNCTION :"schema".outbox_written() OWNER TO :"owner";
ALTER FUNCTION :"schema".outbox_epoch() OWNER TO :"owner";
ALTER FUNCTION :"schema".outbox_put_back() OWNER TO :"owner";
ALTER SEQUENCE :"schema".outbox_generation OWNER TO :"owner";
REVOKE ALL ON :"schema".outbox, :"schema".outbox_lane, :"schema".outbox_hold, :"schema".outbox_epoch FROM PUBLIC;
REVOKE ALL ON FUNCTION :"schema".outbox_epoch() FROM PUBLIC;

-- What the relay fills in (id, state, ending, accepted, settled_at, error, created_at) is not the writer's to set.
GRANT INSERT (event_id, aggregate_type, aggregate_id, version, kind, channels, payload, tags, expires_at, traceparent,
              base_version)
    ON :"schema".outbox TO :"writer";
GRANT EXECUTE ON FUNCTION :"schema".outbox_epoch() TO :"writer", :"relay";

GRANT SELECT, DELETE, UPDATE (state, ending, accepted, settled_at, error, replay) ON :"schema".outbox TO :"relay";
GRANT SELECT, UPDATE ON :"schema".outbox_lane TO :"relay";
GRANT SELECT, INSERT, UPDATE, DELETE ON :"schema".outbox_hold TO :"relay";
-- For `outbox-relay epoch`; the relay itself asks the function.
GRANT SELECT, UPDATE ON :"schema".outbox_epoch TO :"relay";
GRANT SELECT ON SEQUENCE :"schema".outbox_generation, :"schema".outbox_id_seq TO :"relay";

-- Absent where the application's own migrations made the tables.
SELECT format('ALTER TABLE %I.outbox_relay_version OWNER TO %I; GRANT SELECT ON %I.outbox_relay_version TO %I',
              :'schema', :'owner', :'schema', :'relay')
WHERE to_regclass(format('%I.outbox_relay_version', :'schema')) IS NOT NULL \gexec

COMMIT;
