-- Rights on PostgreSQL. Two users: one has the tables, and is nobody's but the administrator's for `init` and `upgrade`;
-- the other one answers, signs and decides, and can add to the log but not change it. As the first, after each of the two:
--     psql -v user=caramel_authority -f postgresql.sql DATABASE
GRANT USAGE ON SCHEMA public TO :"user";
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO :"user";
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO :"user";
REVOKE UPDATE, DELETE ON log FROM :"user";
REVOKE INSERT, UPDATE, DELETE ON alembic_version FROM :"user";
