-- What an administrator runs once, on the primary, in the application's database:
--   psql --single-transaction --set=ON_ERROR_STOP=1 --dbname=shop --file=deploy/postgresql.sql
-- First put in a password and your tables. wal_level must be logical, which takes a restart.

-- REPLICATION lets the role read the WAL of every table of every database: keep its password as the superuser's.
CREATE ROLE cdc_invalidator LOGIN REPLICATION PASSWORD 'change-me' CONNECTION LIMIT 50;

-- The tables that rules name. The daemon does not own them, so it can't publish others itself: when rules come that
-- need more, it says which statement to run here. `cdc-invalidator setup --print` says it beforehand.
CREATE PUBLICATION cdc_invalidator FOR TABLE ONLY public.users;

-- Only where it is needed: for tables that `via` queries read, and for keys over values that may be stored out of line.
-- GRANT USAGE ON SCHEMA public TO cdc_invalidator;
-- GRANT SELECT (user_id, product_id) ON public.orders TO cdc_invalidator;

-- The slot is made by the daemon, once it runs and reaches Redis, and anew when it is lost; REPLICATION is enough for
-- that. A slot that nobody reads holds WAL back without end, so bound it for the time when no daemon runs:
--   ALTER SYSTEM SET max_slot_wal_keep_size = '10GB';
--   SELECT pg_reload_conf();
