-- Posts one body again and again, and prints what came of it as a line of JSON that starts with "WRK ".
-- wrk -s wrk.lua URL -- BODY_FILE CONTENT_TYPE [HEADER VALUE]...
function init(args)
   local file = assert(io.open(args[1], "rb"))
   wrk.method = "POST"
   wrk.body = file:read("*all")
   file:close()
   wrk.headers["Content-Type"] = args[2]
   for i = 3, #args, 2 do
      wrk.headers[args[i]] = args[i + 1]
   end
end

function done(summary, latency, requests)
   local e = summary.errors
   print(string.format(
      'WRK {"requests": %d, "duration_us": %d, "bytes": %d, "connect": %d, "read": %d, "write": %d, "status": %d, '
         .. '"timeout": %d, "p50_us": %d, "p95_us": %d, "p99_us": %d, "max_us": %d}',
      summary.requests, summary.duration, summary.bytes, e.connect, e.read, e.write, e.status, e.timeout,
      latency:percentile(50), latency:percentile(95), latency:percentile(99), latency.max))
end
