#!/bin/sh
# Debian has no Grafana: this reads what Grafana is given, writes where it writes, and says that it is well.
set -eu
[ -n "$GF_SECURITY_ADMIN_PASSWORD" ]
cat /etc/grafana/provisioning/*/perch.yaml /etc/perch/dashboards/serving-dashboard.json >/dev/null
touch /var/lib/grafana/grafana.db
mkdir -p /tmp/www/api
echo '{"database": "ok"}' >/tmp/www/api/health
exec busybox httpd -f -p 3000 -h /tmp/www
