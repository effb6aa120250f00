CREATE TABLE tenants (id bigint PRIMARY KEY, name text NOT NULL, plan text NOT NULL);
CREATE TABLE teams (id bigint PRIMARY KEY, tenant_id bigint NOT NULL, name text NOT NULL);
CREATE TABLE memberships (team_id bigint, user_id bigint, PRIMARY KEY (team_id, user_id));
CREATE TABLE projects (tenant_id bigint, id bigint, team_id bigint NOT NULL, name text, PRIMARY KEY (tenant_id, id))
    PARTITION BY LIST (tenant_id);
CREATE TABLE projects_p1 PARTITION OF projects FOR VALUES IN (1);
CREATE TABLE projects_p2 PARTITION OF projects FOR VALUES IN (2);
CREATE TABLE usage (tenant_id bigint, id bigint, amount int, PRIMARY KEY (tenant_id, id)) PARTITION BY HASH (tenant_id);
CREATE TABLE usage_p0 PARTITION OF usage FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE usage_p1 PARTITION OF usage FOR VALUES WITH (MODULUS 2, REMAINDER 1);
ALTER TABLE tenants REPLICA IDENTITY FULL;
ALTER TABLE projects_p1 REPLICA IDENTITY FULL;
ALTER TABLE projects_p2 REPLICA IDENTITY FULL;
INSERT INTO tenants VALUES (1, 'Acme', 'free'), (2, 'Zeta', 'free');
INSERT INTO teams VALUES (7, 1, 'Red'), (9, 1, 'Green'), (8, 2, 'Gold');
INSERT INTO memberships VALUES (7, 42), (7, 43), (9, 44);
INSERT INTO projects VALUES (1, 5, 7, 'Apollo'), (1, 6, 7, 'Gemini');
