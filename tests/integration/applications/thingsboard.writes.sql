-- a device is renamed
UPDATE device SET name = 'three' WHERE id = u('d1');

-- a device gets a name that was free, and another one its old name
UPDATE device SET name = 'four' WHERE id = u('d2');
UPDATE device SET name = 'two' WHERE id = u('d1');

-- a device moves to another tenant
UPDATE device SET tenant_id = u('02') WHERE id = u('d2');

-- a device is made, with credentials
INSERT INTO device VALUES (u('d4'), u('01'), 'new', NULL, u('82'));
INSERT INTO device_credentials VALUES (u('74'), 'token-4', NULL, u('d4'));

-- a token is changed
UPDATE device_credentials SET credentials_id = 'token-5' WHERE device_id = u('d1');

-- another device profile becomes the default
UPDATE device_profile SET is_default = false WHERE id = u('81');
UPDATE device_profile SET is_default = true WHERE id = u('82');

-- a profile that is not the default is edited
UPDATE device_profile SET profile_data = '{"a": 1}' WHERE id = u('81');

-- a profile gets a key to provision devices
UPDATE device_profile SET provision_device_key = 'k2' WHERE id = u('82');

-- an asset is renamed, and one is deleted with its relations
UPDATE asset SET name = 'Great hall' WHERE id = u('51');
DELETE FROM asset WHERE id = u('52');

-- the default of the asset profiles goes to a new one
UPDATE asset_profile SET is_default = false WHERE id = u('61');
INSERT INTO asset_profile VALUES (u('63'), u('01'), 'new', true);

-- a customer gets another title, and a customer goes
UPDATE customer SET title = 'Garden' WHERE id = u('c1');
DELETE FROM customer WHERE id = u('c2');

-- a user gets another address
UPDATE tb_user SET email = 'ada@example.com' WHERE id = u('f1');

-- settings of a user, of one kind
UPDATE user_settings SET settings = '{"a": 1}' WHERE user_id = u('f1') AND type = 'MOBILE';

-- a user goes, with settings and API key by a cascade
DELETE FROM tb_user WHERE id = u('f1');

-- an edge is renamed
UPDATE edge SET name = 'West' WHERE id = u('e2');

-- a device is taken off an edge
DELETE FROM relation WHERE from_id = u('e2') AND to_id = u('d1');

-- a device is assigned to an edge
INSERT INTO relation VALUES (u('e2'), 'EDGE', u('d2'), 'DEVICE', 'EDGE', 'Contains');

-- an edge is deleted, with all its relations: the cache is swept
-- in vain: 1
DELETE FROM relation WHERE from_id = u('e1');
DELETE FROM edge WHERE id = u('e1');

-- an edge is deleted, and its relations later
DELETE FROM edge WHERE id = u('e2');

-- its relations: without the edge, the cache is swept
-- in vain: 3
DELETE FROM relation WHERE from_id = u('e2');

-- relations to two devices, of a new edge of another tenant
INSERT INTO edge VALUES (u('e3'), u('02'), 'East');
INSERT INTO relation VALUES
    (u('e3'), 'EDGE', u('d1'), 'DEVICE', 'EDGE', 'Contains'), (u('e3'), 'EDGE', u('d2'), 'DEVICE', 'EDGE', 'Contains');

-- the edge is deleted
DELETE FROM edge WHERE id = u('e3');

-- and one of the relations: in a backlog, the deleted edge finds the other one only
-- in vain: 5
DELETE FROM relation WHERE from_id = u('e3') AND to_id = u('d1');

-- a relation of another kind moves
UPDATE relation SET to_id = u('d3') WHERE to_id = u('d2') AND relation_type_group = 'COMMON';

-- a view of another device
UPDATE entity_view SET entity_id = u('d2') WHERE id = u('41');

-- a view is renamed, and one is deleted
UPDATE entity_view SET name = 'Best view' WHERE id = u('41');
DELETE FROM entity_view WHERE id = u('42');

-- a tenant gets another title
UPDATE tenant SET title = 'Acme & Co' WHERE id = u('01');

-- a tenant gets another profile, which becomes the default
UPDATE tenant SET tenant_profile_id = u('a2') WHERE id = u('01');
UPDATE tenant_profile SET is_default = (id = u('a2'));

-- a tenant profile that is not the default is edited; whether it was is not known
-- in vain: 1
UPDATE tenant_profile SET profile_data = '{}' WHERE id = u('a1');

-- a tenant is made
INSERT INTO tenant VALUES (u('0a'), 'Beta', u('a2'));

-- a tenant goes, with its types of alarms by a cascade
DELETE FROM tenant WHERE id = u('02');

-- an attribute of the server
UPDATE attribute_kv SET long_v = 0 WHERE entity_id = u('d1') AND attribute_type = 2;

-- a shared attribute, which the client has under the same name
UPDATE attribute_kv SET long_v = 8 WHERE entity_id = u('d1') AND attribute_type = 3;

-- an attribute whose name is new
INSERT INTO key_dictionary VALUES ('floor', 4);
INSERT INTO attribute_kv (entity_id, attribute_type, attribute_key, long_v) VALUES (u('d1'), 2, 4, 3);

-- a name that goes with all that had it sweeps both caches
-- in vain: 6
DELETE FROM attribute_kv WHERE attribute_key = 4;
DELETE FROM key_dictionary WHERE key_id = 4;

-- a time series goes on, and one ends
UPDATE ts_kv_latest SET ts = 2, long_v = 21 WHERE entity_id = u('d1');
DELETE FROM ts_kv_latest WHERE entity_id = u('d2');

-- software is deleted
DELETE FROM ota_package WHERE id = u('b2');

-- a dashboard gets another title
UPDATE dashboard SET title = 'All rooms' WHERE id = u('91');

-- a dashboard is edited
UPDATE dashboard SET configuration = '{}' WHERE id = u('91');

-- a dashboard and a rule chain are made
INSERT INTO dashboard VALUES (u('93'), u('01'), 'New');
INSERT INTO rule_chain VALUES (u('95'), u('01'), 'Root');

-- an image is renamed
UPDATE resource SET title = 'New logo' WHERE id = u('31');

-- a new type of alarm
INSERT INTO alarm_types VALUES (u('01'), 'Water');

-- QR codes
UPDATE qr_code_settings SET use_system = false WHERE tenant_id = u('01');

-- an API key is switched off
UPDATE api_key SET enabled = false WHERE id = u('12');

-- a model is renamed
UPDATE ai_model SET name = 'Pythia' WHERE id = u('13');

-- settings of the whole server
UPDATE admin_settings SET json_value = '{"a": 1}' WHERE key = 'securitySettings';

-- settings that no cache has
UPDATE admin_settings SET json_value = '{"a": 1}' WHERE key = 'mail';

-- settings of a tenant, of one kind
UPDATE admin_settings SET json_value = '{"a": 1}' WHERE tenant_id = u('01') AND key = 'notifications';

-- another kind
UPDATE admin_settings SET json_value = '{"a": 1}' WHERE key = 'trendz';

-- a repository is taken away
DELETE FROM admin_settings WHERE key = 'entitiesVersionControl';

-- automatic commits
UPDATE admin_settings SET json_value = '{"a": 1}' WHERE key = 'autoCommitSettings';

-- a truncation sweeps
-- in vain: 1
TRUNCATE ts_kv_latest;
