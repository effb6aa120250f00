-- The tables of Saleor whose rows its caches show: their keys, and the columns that matter.
CREATE TABLE app_app (
    id int PRIMARY KEY, name text NOT NULL, identifier text NOT NULL DEFAULT '', is_active boolean NOT NULL DEFAULT true,
    removed_at timestamptz);
CREATE TABLE app_apptoken (
    id int PRIMARY KEY, app_id int NOT NULL REFERENCES app_app DEFERRABLE INITIALLY DEFERRED,
    auth_token text NOT NULL UNIQUE, token_last_4 text NOT NULL);
CREATE TABLE site_sitesettings (
    id int PRIMARY KEY, site_id int NOT NULL UNIQUE, allow_storefront_traffic boolean NOT NULL DEFAULT true);
CREATE TABLE webhook_webhook (
    id int PRIMARY KEY, app_id int NOT NULL REFERENCES app_app DEFERRABLE INITIALLY DEFERRED, target_url text NOT NULL,
    is_active boolean NOT NULL DEFAULT true, secret_key text);
CREATE TABLE webhook_webhookevent (
    id int PRIMARY KEY, webhook_id int NOT NULL REFERENCES webhook_webhook DEFERRABLE INITIALLY DEFERRED,
    event_type text NOT NULL);
CREATE TABLE account_user (
    id int PRIMARY KEY, email text NOT NULL UNIQUE, is_active boolean NOT NULL DEFAULT true, last_login timestamptz,
    private_metadata jsonb NOT NULL DEFAULT '{}');

INSERT INTO app_app VALUES (1, 'Tax'), (2, 'Shipping');
INSERT INTO app_apptoken VALUES (1, 1, 'one', 'e-01'), (2, 2, 'two', 'o-02');
INSERT INTO site_sitesettings VALUES (1, 1), (2, 2);
INSERT INTO webhook_webhook VALUES (1, 1, 'https://tax.example/'), (2, 2, 'https://ship.example/a'), (3, 2, 'https://ship.example/');
INSERT INTO webhook_webhookevent VALUES (1, 1, 'observability'), (2, 2, 'shipping_list'), (3, 3, 'shipping_list');
INSERT INTO account_user (id, email, private_metadata) VALUES
    (1, 'ada@example.org', '{"oidc:https://login.example": "a", "note": "x"}'),
    (2, 'bob@example.org', '{"oidc:https://login.example": "b", "oidc:https://id.example": "bob"}'), (3, 'eva@example.org', '{}');

-- What the application would store under which key. In place of the raw tokens, what the database has of them.
CREATE VIEW cached (key, value) AS
SELECT ':1:AppByTokenLoader:' || md5(token.auth_token), app::text
    FROM app_apptoken token JOIN app_app app ON app.id = app_id AND is_active AND removed_at IS NULL
UNION ALL SELECT ':1:allow_storefront_traffic:' || site_id, allow_storefront_traffic::text FROM site_sitesettings
UNION ALL SELECT ':1:observability_webhooks', string_agg(webhook.id || target_url || coalesce(secret_key, ''), ',' ORDER BY webhook.id)
    FROM webhook_webhook webhook JOIN webhook_webhookevent event ON webhook_id = webhook.id
    JOIN app_app app ON app.id = app_id AND app.is_active AND removed_at IS NULL
    WHERE event_type = 'observability' AND webhook.is_active
UNION ALL SELECT ':1:' || app_id || '-' || target_url || '-shipping_list-' || md5(number::text), webhook::text
    FROM webhook_webhook webhook CROSS JOIN generate_series(1, 3) AS number
UNION ALL SELECT ':1:' || data.key || ':' || data.value, id || ' ' || is_active || ' ' || email
    FROM account_user, jsonb_each_text(private_metadata) AS data WHERE data.key LIKE 'oidc:%';
