-- an app is switched off: of the tokens, only their hashes are known
-- in vain: 1
UPDATE app_app SET is_active = false WHERE id = 1;

-- an app gets a token
-- in vain: 2
INSERT INTO app_apptoken VALUES (3, 2, 'three', 'e-03');

-- a token is withdrawn
-- in vain: 2
DELETE FROM app_apptoken WHERE id = 2;

-- the traffic of a site is stopped
UPDATE site_sitesettings SET allow_storefront_traffic = false WHERE site_id = 1;

-- a webhook gets another secret
-- in vain: 1
UPDATE webhook_webhook SET secret_key = 'x' WHERE id = 2;

-- a webhook moves
-- in vain: 1
UPDATE webhook_webhook SET target_url = 'https://tax.example/v2/' WHERE id = 1;

-- a webhook hears of more
INSERT INTO webhook_webhookevent VALUES (4, 3, 'observability');

-- an app is switched on again
-- in vain: 2
UPDATE app_app SET is_active = true WHERE id = 1;

-- a user may not log in any more
UPDATE account_user SET is_active = false WHERE id = 1;

-- a user logs in
UPDATE account_user SET last_login = now() WHERE id = 2;

-- a user is known elsewhere under another name
UPDATE account_user SET private_metadata = '{"oidc:https://login.example": "bobby"}' WHERE id = 2;

-- a user is deleted
DELETE FROM account_user WHERE id = 2;

-- an app is deleted, with all that belongs to it
-- in vain: 2
DELETE FROM webhook_webhookevent WHERE webhook_id IN (2, 3);
DELETE FROM webhook_webhook WHERE app_id = 2;
DELETE FROM app_apptoken WHERE app_id = 2;
DELETE FROM app_app WHERE id = 2;
