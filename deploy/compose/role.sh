#!/bin/sh
# Runs ../postgresql.sql with the password of the compose file, when the database is made.
set -eu
sed "s/change-me/$CDC_PASSWORD/" "${1:-/cdc-invalidator/postgresql.sql}" |
  psql --single-transaction --set=ON_ERROR_STOP=1 --username="$POSTGRES_USER" --dbname="$POSTGRES_DB"
