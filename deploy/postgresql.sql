-- What an administrator runs once, on the primary, in the application's database:
--   psql --single-transaction --set=ON_ERROR_STOP=1 --dbname=shop --file=deploy/postgresql.sql
-- First put in a password and your tables. wal_level must be logical, which takes a restart.

-- No role shall have a password that everybody knows.
DO $$ BEGIN
  IF 'change-me' = 'change-' || 'me' THEN
    RAISE EXCEPTION 'put a password into this file, in place of each change-%', 'me';
  END IF;
END $$;

-- REPLICATION lets the role read the WAL of every database: guard its password as you do the superuser's.
CREATE ROLE cdc_invalidator LOGIN REPLICATION PASSWORD 'change-me' CONNECTION LIMIT 50;

-- A leader that is frozen or cut off loses the slot to a standby after this time; the default is 60 s.
ALTER ROLE cdc_invalidator SET wal_sender_timeout = '10s';

-- The tables that rules name. `cdc-invalidator setup --print` gives this statement for your rules; when rules come that
-- need more tables, the daemon says what to run.
CREATE PUBLICATION cdc_invalidator FOR TABLE ONLY public.users;

-- From PostgreSQL 18 on, UPDATE and DELETE fail on a published table whose replica identity contains a generated column,
-- unless the publication carries it.
DO $$ BEGIN
  IF current_setting('server_version_num')::int >= 180000 THEN
    ALTER PUBLICATION cdc_invalidator SET (publish_generated_columns = stored);
  END IF;
END $$;

-- The owner may take tables out, which the daemon does with one that lost its replica identity: while it is published,
-- its UPDATEs and DELETEs fail. To put tables in takes their owner, which the daemon is not.
-- (Who is no superuser first runs GRANT cdc_invalidator TO CURRENT_USER and GRANT CREATE ON DATABASE shop TO
-- cdc_invalidator, and takes both back afterwards.)
ALTER PUBLICATION cdc_invalidator OWNER TO cdc_invalidator;

-- Only where it is needed: for tables that `via` queries read, and for keys over values that may be stored out of line.
-- GRANT USAGE ON SCHEMA public TO cdc_invalidator;
-- GRANT SELECT (user_id, product_id) ON public.orders TO cdc_invalidator;

-- The slot is made by the daemon, once it runs and reaches Redis, and anew when it is lost; REPLICATION is enough for
-- that. A slot that nobody reads holds WAL back without end, so bound it for the time when no daemon runs:
--   ALTER SYSTEM SET max_slot_wal_keep_size = '10GB';
--   SELECT pg_reload_conf();
